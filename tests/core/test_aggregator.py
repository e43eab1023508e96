"""The cross-attention of one query: order-blind or not, its parameters, its cost, and the cheaper order of things."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from mmdyt.core.aggregator import CrossAttentionAggregator
from mmdyt.core.macs import count_macs

C, HEADS, T, N = 32, 4, 5, 7


def build(trained: bool = True, **options) -> CrossAttentionAggregator:
    """An aggregator with every parameter away from its start, as training leaves it."""
    torch.manual_seed(0)
    aggregator = CrossAttentionAggregator(C, HEADS, **options).double()
    if trained:
        for parameter in aggregator.parameters():
            nn.init.normal_(parameter)
    return aggregator


def clips(count: int = 3) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(count, T, N, C, dtype=torch.float64)


def test_one_query_attends_to_all_tokens_of_all_frames():
    """The definition, written out: softmax(q k^T / sqrt(d)) v per head, LayerNorm on query, key and value."""
    a, x = build(), clips()
    norm = lambda z, layer: F.layer_norm(z, (C,), layer.weight, layer.bias, 1e-6)  # noqa: E731
    tokens = x.reshape(3, T * N, C)
    q = norm(a.query, a.norm_q) @ a.q.weight.T + a.q.bias
    k = norm(tokens, a.norm_k) @ a.k.weight.T + a.k.bias
    v = norm(tokens, a.norm_v) @ a.v.weight.T + a.v.bias
    found = []
    for h in range(HEADS):
        part = slice(h * C // HEADS, (h + 1) * C // HEADS)
        weights = (k[..., part] @ q[part] / (C / HEADS) ** 0.5).softmax(dim=1)
        found.append((weights[..., None] * v[..., part]).sum(dim=1))
    expected = torch.cat(found, dim=1) @ a.proj.weight.T + a.proj.bias
    torch.testing.assert_close(a(x), expected)


@pytest.mark.parametrize('fold', [False, True])
def test_without_positions_the_order_of_frames_does_not_matter(fold):
    aggregator, x = build(fold_projections=fold), clips()
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(aggregator(x), aggregator(x[:, order]))


@pytest.mark.parametrize('fold', [False, True])
def test_with_positions_the_order_of_frames_matters_once_they_are_trained(fold):
    aggregator, x = build(temporal_positions=T, fold_projections=fold), clips()
    backwards = x.flip(1)
    assert (aggregator(x) - aggregator(backwards)).abs().max() > 1e-2
    nn.init.zeros_(aggregator.temporal_positions)
    torch.testing.assert_close(aggregator(x), aggregator(backwards))


def test_fresh_positions_are_zero_and_have_a_gradient():
    plain, temporal, x = build(trained=False), build(trained=False, temporal_positions=T), clips()
    temporal.load_state_dict(plain.state_dict(), strict=False)
    assert temporal.temporal_positions.shape == (T, C) and not temporal.temporal_positions.any()
    torch.testing.assert_close(plain(x), temporal(x), rtol=0, atol=0)
    temporal(x).square().sum().backward()
    assert temporal.temporal_positions.grad.abs().sum() > 0


def test_every_token_is_read():
    aggregator, x = build(), clips(1).requires_grad_()
    aggregator(x).square().sum().backward()
    assert (x.grad.abs().sum(dim=-1) > 0).all()


@pytest.mark.parametrize('options', [dict(), dict(temporal_positions=T)])
def test_folded_projections_are_the_same_function(options):
    plain, folded, x = build(**options), build(fold_projections=True, **options), clips()
    torch.testing.assert_close(folded(x), plain(x), rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad(a(x).square().sum(), list(a.parameters())) for a in (plain, folded)]
    for (name, _), p, f in zip(plain.named_parameters(), *grads, strict=True):
        torch.testing.assert_close(f, p, rtol=1e-7, atol=1e-7, msg=name)


def test_a_clip_does_not_depend_on_its_batch_mates():
    aggregator, x = build(), clips()
    torch.testing.assert_close(aggregator(x)[1:2], aggregator(x[1:2]))


def test_parameters_of_vitb_are_those_of_the_formula():
    """Query C, three LayerNorms of 2 C, four projections of C^2 + C: 2.37 M, the paper's number for ViT-B."""
    aggregator = CrossAttentionAggregator(768, 12)
    count = sum(p.numel() for p in aggregator.parameters())
    assert count == 768 + 3 * 2 * 768 + 4 * (768**2 + 768) == 2_367_744
    temporal = CrossAttentionAggregator(768, 12, temporal_positions=8)
    assert sum(p.numel() for p in temporal.parameters()) == count + 8 * 768


@pytest.mark.parametrize(('fold', 'per_token'), [(False, 2 * C**2 + 2 * C), (True, 2 * HEADS * C)])
def test_operators_that_run_cost_what_the_docstring_says(fold, per_token):
    aggregator, x = build(fold_projections=fold), clips()
    tokens, clip_count = T * N, len(x)
    norms = 2 * 5 * tokens * C * clip_count + 5 * C
    query = C**2 + (C**2 if fold else 0)  # is projected once, and once more through the keys' weight
    each_clip = tokens * per_token + C**2 + (C**2 if fold else 0)
    assert count_macs(lambda: aggregator(x)) == norms + query + clip_count * each_clip


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(num_heads=5), r'num_heads must be a divisor of dim 32, got 5\.'),
        (dict(num_heads=0), r'num_heads must be a divisor of dim 32, got 0\.'),
        (dict(num_heads=4.0), r'num_heads must be a divisor of dim 32, got 4\.0\.'),
        (dict(temporal_positions=-1), 'temporal_positions must be a number of frames, or 0, got -1'),
        (dict(temporal_positions='learned'), "temporal_positions must be a number of frames, or 0, got 'learned'"),
    ],
)
def test_mistakes_are_refused_in_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        CrossAttentionAggregator(C, **(dict(num_heads=HEADS) | options))


def test_clips_of_another_length_than_the_positions_are_refused():
    with pytest.raises(
        ValueError, match='temporal_positions must be the number of frames of the clips, got 8 for clips'
    ):
        build(temporal_positions=8)(clips())
