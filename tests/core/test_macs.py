import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from mmdyt.core.macs import BesideCost, BlockCost, count_macs, exact

C, D = 768, 64
VIT_B = BlockCost(
    dim=C,
    query=2 * C * C,
    key=2 * C * C + 5 * C,
    row=8 * C * C + 5 * C,
    beside=dict(mlp=BesideCost(token=2 * C * D, patch=C, image=7)),
)


def test_a_block_costs_what_the_formula_says():
    """4 a C^2 + 2 a^2 C + 8 k C^2 + 2 n C d + N C + 5 (a + k) C: of n tokens, N patches, a run attention, k the MLP."""
    n, a, k = 197, 150, 99
    assert VIT_B.attention(a, a) + VIT_B.mlp(k) == 4 * a * C**2 + 2 * a**2 * C + 8 * k * C**2 + 5 * a * C + 5 * k * C
    assert VIT_B.parts('mlp', n, n - 1) == 2 * n * C * D + (n - 1) * C + 7
    assert VIT_B.parts('attn', n, n - 1) == 0


def test_queries_that_are_read_attend_to_keys_that_are_not():
    """One query of a keys: its projection and the output's, keys and values of all, two products with each."""
    a = 150
    assert VIT_B.attention(1, a) == 2 * C**2 + a * (2 * C**2 + 5 * C) + 2 * a * C


def test_counts_in_single_precision_lose_no_multiply_add():
    counts = [1.0, 101.0, 196.0]
    batched = exact(torch.tensor(counts))
    found = VIT_B.attention(batched, batched) + VIT_B.mlp(batched) + VIT_B.parts('mlp', batched, batched - 1)
    whole = [VIT_B.attention(k, k) + VIT_B.mlp(k) + VIT_B.parts('mlp', k, k - 1) for k in counts]
    assert found.tolist() == whole


def test_counter_sees_attention_however_it_is_computed():
    q = torch.randn(2, 3, 10, 8)
    expected = 2 * (2 * 3 * 10 * 10 * 8)
    assert count_macs(lambda: F.scaled_dot_product_attention(q, q, q)) == expected
    assert count_macs(lambda: (q @ q.transpose(-1, -2)).softmax(-1) @ q) == expected


def test_counter_sees_the_fast_path_of_multihead_attention_and_puts_it_back():
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(1, 5, 16)
    assert torch.backends.mha.get_fastpath_enabled()
    assert count_macs(lambda: attention(x, x, x)) == 5 * 4 * 16 * 16 + 2 * 5 * 5 * 16
    assert torch.backends.mha.get_fastpath_enabled()


def test_counter_counts_single_multiply_adds_of_convolutions_and_norms():
    x = torch.randn(1, 3, 8, 8)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    assert count_macs(lambda: conv(x)) == 8 * 8 * 4 * 3 * 9
    norm = nn.LayerNorm(16)
    assert count_macs(lambda: norm(torch.randn(2, 7, 16))) == 5 * 2 * 7 * 16


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_counter_runs_without_data(device):
    linear = nn.Linear(8, 4, device=device)
    assert count_macs(lambda: linear(torch.empty(3, 8, device=device))) == 3 * 8 * 4
