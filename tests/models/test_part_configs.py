"""Configs of parts: the short arguments of a backbone, and the list of anything more."""

import pytest
import torch
import torch.nn as nn
from test_vit import TINY

from mmdyt.core.part import Delta, Part, parts
from mmdyt.core.tuning import count_parameters
from mmdyt.models import DyTVisionTransformer
from mmdyt.models.part_configs import ADAPTER, DISPATCHER, as_parts
from mmdyt.parts.adapter import Adapter
from mmdyt.parts.dispatcher import TokenDispatcher
from mmdyt.parts.mean_update import MeanUpdate
from mmdyt.parts.moe_adapter import MoEAdapter


def build(**options) -> DyTVisionTransformer:
    torch.manual_seed(0)
    return DyTVisionTransformer(arch=TINY, img_size=32, patch_size=8, **options)


def places(model, kind=Part) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


def test_short_arguments_are_parts_of_each_dispatched_branch():
    mean = dict(type='mmdyt.MeanUpdate')
    configs = as_parts('attn_mlp', dict(bottleneck=4), DISPATCHER, mean)
    for site, found in zip(('attn', 'mlp'), (configs[:3], configs[3:]), strict=True):
        assert found == [dict(ADAPTER, bottleneck=4, site=site), dict(DISPATCHER, site=site), dict(mean, site=site)]
    assert as_parts('layer', None, None, None) == []


def test_a_part_can_be_added_by_the_list_as_well_as_by_its_argument():
    short = build(adapter=dict(bottleneck=4), substitute=dict(type='mmdyt.MeanUpdate'))
    listed = build(
        adapter=None,
        dispatcher=None,
        parts=[
            dict(type='mmdyt.Adapter', bottleneck=4),
            dict(type='mmdyt.TokenDispatcher'),
            dict(type='mmdyt.MeanUpdate', site='mlp'),
        ],
    )
    assert list(listed.state_dict()) == list(short.state_dict())
    for name, tensor in short.state_dict().items():
        assert torch.equal(listed.state_dict()[name], tensor), name
    assert [p.requires_grad for p in listed.parameters()] == [p.requires_grad for p in short.parameters()]


def test_a_class_is_as_good_as_its_name():
    model = build(adapter=None, parts=[dict(type=Adapter, bottleneck=4)])
    assert places(model, Adapter) == [f'layers.{i}.dynamic.mlp.adapter' for i in range(3)]


@pytest.mark.parametrize(
    ('layers', 'chosen'), [(None, [0, 1, 2]), ([1], [1]), ([-1, 0], [0, 2]), ([2, -1], [2]), ((0, 1, 2), [0, 1, 2])]
)
def test_some_layers_get_a_part_where_layers_says_so(layers, chosen):
    config = dict(type='mmdyt.Adapter', bottleneck=4, site='attn') | ({} if layers is None else dict(layers=layers))
    model = build(adapter=None, parts=[config])
    assert places(model, Delta) == [f'layers.{i}.dynamic.attn.adapter' for i in chosen]
    assert count_parameters(model)['adapter'] == len(chosen) * (2 * 32 * 4 + 4 + 32)
    with torch.no_grad():
        assert torch.isfinite(model.eval()(torch.randn(2, 3, 32, 32))[0]).all()


def test_a_mean_update_may_be_in_some_layers_only():
    model = build(parts=[dict(type='mmdyt.MeanUpdate', layers=[1])])
    assert places(model, MeanUpdate) == ['layers.1.dynamic.mlp.substitute']
    assert len(places(model, TokenDispatcher)) == 3


def test_what_the_parts_declare_is_tuned_by_default():
    model = build(dispatcher=dict(fitted=True), parts=[dict(type='mmdyt.Adapter', site='attn')])
    tuned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert tuned == {name for name, _ in model.named_parameters() if '.adapter.' in name}
    assert len(list(parts(model))) == 3 * 3
    again = build(tuned=['parts', 'ln1'])
    tuned = {name for name, p in again.named_parameters() if p.requires_grad}
    assert tuned == {name for name, _ in again.named_parameters() if 'ln1' in name or '.dynamic.' in name}


def test_frames_per_clip_is_a_mixture_of_the_clip():
    moe = dict(type='mmdyt.MoEAdapter', bottleneck=4)
    for frames, routing in ((None, 'frame'), (1, 'frame'), (4, 'clip')):
        model = build(adapter=moe | ({} if frames is None else dict(frames_per_clip=frames)))
        assert {part.routing for part in parts(model) if isinstance(part, MoEAdapter)} == {routing}
        assert model.frames_per_clip == (frames or 1)
    assert build(adapter=moe | dict(routing='clip')).frames_per_clip == 1  # clips of any length


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (
            dict(parts=[dict(type='mmdyt.Adapter')]),
            ValueError,
            "parts must have words of their own within a branch, got two named 'adapter'",
        ),
        (
            dict(parts=[dict(type='mmdyt.TokenDispatcher', site='mlp')]),
            ValueError,
            "parts must have words of their own within a branch, got two named 'dispatcher'",
        ),
        (
            dict(parts=[dict(type='mmdyt.Adapter', site='attn')] * 2),
            ValueError,
            "parts must have words of their own within a branch, got two named 'adapter'",
        ),
        (
            dict(parts=[dict(type='mmdyt.Adapter', site='layer')]),
            ValueError,
            r"site must be one of \['attn', 'mlp'\] with dispatch='mlp', got 'layer'",
        ),
        (
            dict(parts=[dict(type='mmdyt.Adapter', site='attn', layers=[3])]),
            ValueError,
            'layers must hold indices below the depth 3, got 3',
        ),
        (
            dict(parts=[dict(type='mmdyt.Adapter', site='attn', layers=[-4])]),
            ValueError,
            'layers must hold indices below the depth 3, got -4',
        ),
        (
            dict(parts=[dict(type='mmdyt.Adapter', site='attn', layers=[0.5])]),
            ValueError,
            'layers must hold indices below the depth 3, got 0.5',
        ),
        (
            dict(parts=[dict(type='mmdyt.MoEAdapterNeck', in_channels=32)]),
            ValueError,
            "parts.type must name a part, a subclass of mmdyt.core.part.Part, got 'mmdyt.MoEAdapterNeck'",
        ),
        (
            dict(parts=[dict(type='mmdyt.Adaptor')]),
            KeyError,
            "parts.type must be a registered type, got 'mmdyt.Adaptor'",
        ),
        (
            dict(adapter=dict(type='mmdyt.MoEAdapter', frames_per_clip=0)),
            ValueError,
            'frames_per_clip must be a positive integer, got 0',
        ),
        (
            dict(adapter=dict(type='mmdyt.MoEAdapter', frames_per_clip=2.0)),
            ValueError,
            'frames_per_clip must be a positive integer, got 2.0',
        ),
    ],
)
def test_mistakes_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        build(**options)


def test_clips_of_another_length_than_a_mixture_are_refused():
    model = build(adapter=dict(type='mmdyt.MoEAdapter', frames_per_clip=2), out_type='raw')
    assert model(torch.randn(1, 3, 2, 32, 32))[0].shape == (1, 2, 17, 32)
    with pytest.raises(ValueError, match='frames_per_clip must be 1 or the 3 frames of a clip, got 2'):
        model(torch.randn(1, 3, 3, 32, 32))


def test_frames_that_a_host_folded_into_the_batch_share_the_mixture_of_their_clip():
    """As mmaction2's 2D recognizers fold them."""
    model = build(adapter=dict(type='mmdyt.MoEAdapter', frames_per_clip=2), out_type='raw').eval()
    for adapter in (part for part in parts(model) if isinstance(part, MoEAdapter)):
        nn.init.normal_(adapter.up_weight)
    clips = torch.randn(3, 3, 2, 32, 32)
    with torch.no_grad():
        (whole,) = model(clips)
        (folded,) = model(clips.transpose(1, 2).flatten(0, 1))
        (alone,) = model(clips.flip(0)[:1])
    torch.testing.assert_close(folded.unflatten(0, (3, 2)), whole)
    torch.testing.assert_close(alone[0], whole[2], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match='frames_per_clip must divide the frames of a batch, got 2 and 5'):
        model(torch.randn(5, 3, 32, 32))
