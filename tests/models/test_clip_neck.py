"""The neck of clips: mmaction2's contract, MoE-adapters routed per clip or per frame, the aggregator behind them."""

import pytest
import torch
import torch.nn as nn

from mmdyt.models.clip_neck import ClipNeck
from mmdyt.parts.moe_adapter import MoEAdapter

C, V, T, N = 16, 2, 3, 5
MOE = dict(type='mmdyt.MoEAdapter', bottleneck=4, num_experts=3, dropout=0.0)
QUERY = dict(type='mmdyt.CrossAttentionAggregator', num_heads=2)


def build(**options) -> ClipNeck:
    torch.manual_seed(0)
    neck = ClipNeck(C, **options).double()
    if neck.adapter is not None:
        for parameter in neck.adapter.parameters():
            nn.init.normal_(parameter)
    return neck


def tokens() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(V, T, N, C, dtype=torch.float64)


def maps() -> torch.Tensor:
    """The patch tokens of :func:`tokens` as maps (V, C, T, 1, N)."""
    return tokens().permute(0, 3, 1, 2)[:, :, :, None]


def test_returns_features_and_an_empty_loss_dict_as_mmaction2_wants_them():
    x = tokens()
    features, losses = build(adapter=MOE, aggregator=QUERY)(x, data_samples=[])
    assert features.shape == (V, C) and losses == {}
    features, losses = build()(x)
    assert features is x and losses == {}


def test_one_mixture_a_clip_reads_all_frames():
    neck, x = build(adapter=MOE, routing='clip'), tokens()
    moe: MoEAdapter = neck.adapter.adapter
    a = moe.expert_weights(x.flatten(1, 2))  # (V, E), from the mean over all tokens of all frames
    assert a.shape == (V, 3)
    expected = x + torch.stack([moe._mix_weights(clip, a[i].expand(T, -1)) for i, clip in enumerate(x)]) * moe.scale
    torch.testing.assert_close(neck(x)[0], expected)


def test_one_mixture_a_frame_reads_that_frame():
    neck, x = build(adapter=MOE, routing='frame'), tokens()
    frames = torch.stack([torch.stack([neck.adapter(frame[None])[0] for frame in clip]) for clip in x])
    torch.testing.assert_close(neck(x)[0], frames)
    changed = x.clone()
    changed[:, 0] += 1
    torch.testing.assert_close(neck(changed)[0][:, 1:], frames[:, 1:])
    assert (build(adapter=MOE, routing='clip')(changed)[0] - build(adapter=MOE, routing='clip')(x)[0])[:, 1:].any()


@pytest.mark.parametrize('routing', ['clip', 'frame'])
def test_maps_are_adapted_as_their_tokens_are(routing):
    neck = build(adapter=MOE, routing=routing)
    adapted = neck(maps())[0]
    assert adapted.shape == (V, C, T, 1, N)
    torch.testing.assert_close(adapted[:, :, :, 0].permute(0, 2, 3, 1), neck(tokens())[0])


@pytest.mark.parametrize('routing', ['clip', 'frame'])
@pytest.mark.parametrize('x', [tokens(), maps()], ids=['tokens', 'maps'])
def test_fresh_adapters_change_nothing(routing, x):
    neck = ClipNeck(C, adapter=MOE, routing=routing).double()
    torch.testing.assert_close(neck(x)[0], x, rtol=0, atol=0)
    neck = ClipNeck(C, adapter=MOE, init_cfg=dict(type='TruncNormal', layer='Linear', std=1.0))
    neck.init_weights()
    assert not neck.adapter.adapter.up_weight.any()


@pytest.mark.parametrize('routing', ['clip', 'frame'])
def test_a_clip_does_not_depend_on_its_batch_mates(routing):
    neck, x = build(adapter=MOE, routing=routing, aggregator=QUERY), tokens()
    torch.testing.assert_close(neck(x)[0][1:], neck(x[1:])[0])


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(in_channels=0), 'in_channels must be a positive integer, got 0'),
        (dict(routing='view'), r"routing must be one of \['clip', 'frame'\], got 'view'"),
        (dict(adapter='moe'), "adapter must be a config or None, got 'moe'"),
        (
            dict(adapter=dict(type='mmdyt.MoEAdapter', frames_per_clip=2)),
            'frames_per_clip must be 1 in the adapter of a ClipNeck, whose routing decides, got 2',
        ),
        (dict(aggregator=True), 'aggregator must be a config or None, got True'),
        (dict(aggregator=dict(num_heads=3)), r'num_heads must be a divisor of dim 16, got 3\.'),
    ],
)
def test_mistakes_are_refused_in_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        ClipNeck(**(dict(in_channels=C) | options))


@pytest.mark.parametrize(
    ('x', 'message'),
    [
        ((tokens(),), r'features must be \(V, T, N, C\) or \(V, C, T, H, W\), got tuple'),
        (tokens()[0], r'features must be .*, got \(3, 5, 16\)'),
        (maps(), r"features must be tokens \(V, T, N, C\) for an aggregator, .* Set the backbone's out_type='raw'"),
        (tokens()[..., :8], 'features must have 16 channels, as in_channels says, got 8'),
    ],
)
def test_features_that_were_not_promised_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        build(aggregator=QUERY)(x)
