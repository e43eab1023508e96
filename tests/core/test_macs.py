import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from mmdyt.core.macs import ViTSize, count_macs, dense_vit_macs, vit_macs

C = 768
CLASSES = 1000


def vit_b(bottleneck: int) -> ViTSize:
    return ViTSize(C, 16 * 16 * 3, 4 * C * C, 8 * C * C, 2 * C * bottleneck, C)


def giga(macs: float) -> float:
    return (macs + C * CLASSES) / 1e9  # the paper counts the linear head too


@pytest.mark.parametrize(
    ('bottleneck', 'rate', 'expected'),
    # arXiv 2403.11808's counter, ViT-B/16 at 224, 1000 classes; 17.8169, printed there cut to 17.816
    [(64, 1.0, 17.817), (64, 0.5, 12.263), (8, 0.5, 12.060)],
)
def test_closed_form_gives_the_published_counts(bottleneck, rate, expected):
    macs = vit_macs(vit_b(bottleneck), 196, [(197, 1 + rate * 196)] * 12)
    assert giga(macs) == pytest.approx(expected, abs=5e-4)


def test_dense_is_the_plain_vit():
    assert giga(dense_vit_macs(vit_b(64), 196, 12)) == pytest.approx(17.58, abs=5e-3)


def test_counts_in_single_precision_lose_no_multiply_add():
    counts = [1.0, 101.0, 196.0]
    exact = [vit_macs(vit_b(64), 196, [(k, k)] * 12) for k in counts]
    batched = vit_macs(vit_b(64), 196, [(torch.tensor(counts), torch.tensor(counts))] * 12)
    assert batched.tolist() == exact


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match=r'active must hold counts in \[0, 197\], got 197 to 198'):
        vit_macs(vit_b(8), 196, [(197, 198)])


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
