"""What the heads of a segmentor may know of each level that they read: which of its cells ran."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.structures import PixelData

import mmdyt.models.segmentor  # noqa: F401  repairs the wheels before mmseg is imported
from mmdyt.core.observe import complete_model, dynamic_branches, record_dispatch
from mmdyt.core.teacher import FeatureTeacher
from mmdyt.models.necks import level_factors

# isort: split
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

NORM = dict(type='BN', requires_grad=True)
NECKS = dict(
    pyramid=(dict(type='Feature2Pyramid', embed_dim=32, rescales=[4, 2, 1, 0.5], norm_cfg=NORM), [4, 2, 1, 0.5]),
    coarser=(dict(type='Feature2Pyramid', embed_dim=32, rescales=[2, 1, 0.5, 0.25], norm_cfg=NORM), [2, 1, 0.5, 0.25]),
    disordered=(dict(type='Feature2Pyramid', embed_dim=32, rescales=[1, 0.5, 4, 2], norm_cfg=NORM), [4, 2, 1, 0.5]),
    adapted=(
        dict(type='mmdyt.MoEAdapterNeck', in_channels=[32] * 4, rescales=[4, 2, 1, 0.5], norm_cfg=NORM),
        [4, 2, 1, 0.5],
    ),
    adapters=(dict(type='mmdyt.MoEAdapterNeck', in_channels=[32] * 4), [1, 1, 1, 1]),
    bilinear=(
        dict(type='MultiLevelNeck', in_channels=[32] * 4, out_channels=32, scales=[3, 2, 1, 0.5]),
        [3, 2, 1, 0.5],
    ),
    none=(None, [1, 1, 1, 1]),
)
DISPATCHERS = [
    dict(type='mmdyt.TokenDispatcher'),
    dict(type='mmdyt.TokenDispatcher', noise=False),
    dict(type='mmdyt.SampleDispatcher'),
    dict(type='mmdyt.CellDispatcher', cell=(2, 2)),
    dict(type='mmdyt.RandomDispatcher', rate=0.5),
]


@pytest.fixture
def build(tiny_model_cfg):
    def built(neck=NECKS['pyramid'][0], **backbone):
        torch.manual_seed(0)
        backbone = {**tiny_model_cfg.backbone, 'init_cfg': None, **backbone}  # a Config would merge the dicts within
        model = MODELS.build(dict(tiny_model_cfg, neck=neck, backbone=backbone))
        for branch in dynamic_branches(model).values():
            if hasattr(branch.dispatcher, 'gate'):
                nn.init.normal_(branch.dispatcher.gate.weight)
        return model

    return built


def expected_masks(dispatches, grid, factors):
    """Of four levels behind one block each, by the samplers of torch."""
    found = []
    for of_level, factor in zip(dispatches, factors, strict=True):
        mask = torch.stack([d.patch_mask.float() for d in of_level]).mean(0)
        mask = mask.squeeze(-1).unflatten(1, grid).unsqueeze(1)
        if factor < 1:
            found.append(F.avg_pool2d(mask, round(1 / factor)))
        else:
            found.append(F.interpolate(mask, scale_factor=factor, mode='nearest'))
    return found


@pytest.mark.parametrize('size', [(64, 64), (80, 112), (70, 90)])
@pytest.mark.parametrize('name', NECKS)
def test_masks_have_the_grid_of_the_features_behind_the_neck(build, name, size):
    neck, factors = NECKS[name]
    model, inputs = build(neck).eval(), torch.randn(2, 3, *size)
    with torch.no_grad(), record_dispatch(model) as record:
        features = model.extract_feat(inputs)
    masks = model.level_masks(record, inputs)
    assert [mask.shape for mask in masks] == [(2, 1, *feature.shape[2:]) for feature in features]
    expected = expected_masks([[d] for d in record.flat()], model.backbone.grid(*size), factors)
    torch.testing.assert_close(masks, tuple(expected), rtol=0, atol=1e-6)
    assert min(mask.mean() for mask in masks) > 0 and max(mask.mean() for mask in masks) < 1


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('dispatch', ['mlp', 'attn_mlp', 'layer'])
@pytest.mark.parametrize('dispatcher', DISPATCHERS, ids=lambda d: str(list(d.values())))
def test_every_dispatcher_has_masks_and_prompts_are_in_none(build, dispatcher, dispatch, training):
    model = build(dispatcher=dispatcher, dispatch=dispatch, parts=[dict(type='mmdyt.Prompts', length=3)])
    model.train(training)
    inputs = torch.randn(2, 3, 80, 48)
    with torch.set_grad_enabled(training), record_dispatch(model) as record:
        model.extract_feat(inputs)
    masks, decided = model.level_masks(record, inputs), record.flat()
    by_block = [decided[i : i + len(decided) // 4] for i in range(0, len(decided), len(decided) // 4)]
    torch.testing.assert_close(masks, tuple(expected_masks(by_block, (5, 3), [4, 2, 1, 0.5])), rtol=0, atol=1e-6)
    learns = training and dispatcher['type'] != 'mmdyt.RandomDispatcher'
    assert all(mask.requires_grad == learns for mask in masks)


@pytest.mark.parametrize('complete', [True, False])
def test_every_cell_ran_without_a_dispatcher_and_in_the_complete_model(build, complete):
    model, inputs = (
        build(**({} if complete else dict(dispatcher=None, dispatch='mlp'))).eval(),
        torch.randn(2, 3, 80, 48),
    )
    with torch.no_grad(), record_dispatch(model) as record:
        if complete:
            with complete_model(model):
                features = model.extract_feat(inputs)
        else:
            features = model.extract_feat(inputs)
    for mask, feature in zip(model.level_masks(record, inputs), features, strict=True):
        assert torch.equal(mask, torch.ones(2, 1, *feature.shape[2:]))


def test_a_level_has_the_blocks_since_the_one_before(build):
    model = build(None, out_indices=(2, 3), dispatch='mlp').eval()
    inputs = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), record_dispatch(model) as record:
        model.extract_feat(inputs)
    decided = record.flat()
    expected = expected_masks([decided[:3], decided[3:]], (4, 4), [1, 1])
    torch.testing.assert_close(model.level_masks(record, inputs), tuple(expected))


def test_passes_and_windows_have_masks_of_their_own(build):
    model = build().eval()
    model.test_cfg.update(mode='slide', crop_size=(64, 64), stride=(32, 32))
    inputs = torch.randn(2, 3, 64, 96)
    with torch.no_grad(), record_dispatch(model) as record:
        model.predict(inputs)
    found = [model.level_masks(record, inputs[..., :64], index) for index in (0, 1)]
    for index, first in enumerate((0, 32)):
        window = inputs[..., first : first + 64]
        with torch.no_grad(), record_dispatch(model) as alone:
            model.extract_feat(window)
        torch.testing.assert_close(found[index], model.level_masks(alone, window))
    with pytest.raises(ValueError, match='index must be that of one of 2 passes of backbone.layers.0.*, got 2'):
        model.level_masks(record, inputs[..., :64], 2)


def samples(size):
    labels = torch.randint(0, 3, (1, *size))
    meta = dict(ori_shape=size, img_shape=size, img_path='x.png')
    return [SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=meta) for _ in range(2)]


def test_padding_is_inactive_for_heads_and_weighs_as_what_ran(build, monkeypatch):
    """An image of 64 x 64 and one that is padded to that from 64 x 32."""
    model, inputs, data = build().eval(), torch.randn(2, 3, 64, 64), samples((64, 64))
    data[1].set_metainfo(dict(img_shape=(64, 32), img_padding_size=(0, 32, 0, 0)))
    found = []
    monkeypatch.setattr(FeatureTeacher, 'loss', lambda *args: found.append(args[-1]) or torch.zeros(()))
    model.set_teacher(FeatureTeacher(model.backbone, 1.0, inactive_weight=1.0))
    with record_dispatch(model) as record:
        model.train()(inputs, data, mode='loss')
    if all(d.padding is None for d in record.flat()):
        pytest.fail('the host must tell of padding')
    for level in range(4):
        assert not model.level_masks(record, inputs)[level][1, ..., -1:].any()
        assert bool((found[0][level][1, ..., -2:] == 1).all()) and found[0][level][1, ..., :2].mean() < 1


def test_losses_weigh_the_cells_of_each_level_of_the_backbone(build):
    model, inputs = build().train(), torch.randn(2, 3, 64, 64)
    data = samples((64, 64))
    values = []
    for inactive_weight in (0.0, 3.0):
        model.set_teacher(FeatureTeacher(model.backbone, 1.0, inactive_weight=inactive_weight))
        torch.manual_seed(1)
        values.append(model.loss(inputs, data)['loss_features'])
    assert values[0] > 0 and not torch.isclose(*values, rtol=1e-3)
    with complete_model(model):
        torch.manual_seed(1)
        complete = model.loss(inputs, data)['loss_features']
    model.set_teacher(FeatureTeacher(model.backbone, 1.0))
    with complete_model(model):
        torch.manual_seed(1)
        torch.testing.assert_close(model.loss(inputs, data)['loss_features'], complete)
    values[1].backward()
    assert all(b.adapter.up.weight.grad is not None for b in dynamic_branches(model).values())


def test_clips_have_masks_of_each_frame(build):
    """The features of clips, as :func:`level_masks` shapes them."""
    from mmdyt.core.levels import level_masks

    backbone = build().backbone.eval()
    with torch.no_grad(), record_dispatch(backbone) as record:
        features = backbone(torch.randn(2, 3, 3, 64, 48))
    masks = level_masks(record.of_pass(), backbone.out_indices, features[0])
    assert [mask.shape for mask in masks] == [(2, 1, 3, 4, 3)] * 4
    for mask, dispatch in zip(masks, record.flat(), strict=True):
        assert torch.equal(mask, dispatch.patch_mask.view(2, 3, 4, 3).unsqueeze(1))


@pytest.mark.parametrize(
    ('neck', 'levels', 'message'),
    [
        (nn.Identity(), 4, 'neck must tell its factors, by rescales or scales, got a Identity'),
        (dict(scales=[2, 1]), 4, r'neck must have a factor for each of 4 levels, got \[2, 1\]'),
    ],
)
def test_necks_that_do_not_tell_are_refused(neck, levels, message):
    if isinstance(neck, dict):
        module = nn.Module()
        module.scales, neck = neck['scales'], module
    with pytest.raises(ValueError, match=f'^{message}'):
        level_factors(neck, levels)


def test_of_a_single_level_a_neck_makes_several():
    neck = MODELS.build(dict(type='mmseg.MultiLevelNeck', in_channels=[8], out_channels=8))
    assert level_factors(neck, 1) == [0.5, 1, 2, 4] and level_factors(None, 1) == [1]
