"""The leaves with light heads, shrunk: they train, are tested, and are counted as what runs."""

import json
import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from tiny_configs import TINY_ARCH

import mmdyt.models.segmentor  # noqa: F401  repairs the wheels, registers
from mmdyt.core.macs import count_macs
from mmdyt.core.observe import dynamic_branches, record_dispatch
from mmdyt.engine.costs import CostCounter

ROOT = Path(__file__).parents[1]
HEADS = {
    'linear_vitti_camvid': dict(in_channels=32, channels=32),
    'segmenter_vitti_camvid': dict(in_channels=32, channels=32, embed_dims=32, num_heads=2),
    'upernet256_vitti_camvid': dict(in_channels=[32] * 4, pool_scales=(1, 2)),
}
SLIDE = dict(mode='slide', crop_size=(64, 64), stride=(32, 32))
SHORT = ['train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'default_hooks.checkpoint.interval=2']


def shrunk(leaf: str, pretrained: Path, **test_cfg) -> dict:
    """The leaf's model on the tiny base and three classes; the head is the leaf's but for its widths."""
    model = Config.fromfile(ROOT / f'configs/dyt/{leaf}.py', import_custom_modules=False).model
    levels = (0, 1, 2, 3) if len(model.backbone.out_indices) > 1 else [3]
    model.backbone.update(arch=dict(TINY_ARCH), img_size=(64, 64), out_indices=levels, adapter=dict(bottleneck=4))
    model.backbone.init_cfg.checkpoint = str(pretrained)
    model.data_preprocessor.size = (64, 64)
    model.decode_head.update(HEADS[leaf], num_classes=3)
    if model.neck:
        model.neck.embed_dim = 32
        model.auxiliary_head.update(in_channels=32, channels=16, num_classes=3)
    if test_cfg:
        model.test_cfg = test_cfg
    return model


@pytest.fixture(params=HEADS)
def leaf(request) -> str:
    return request.param


def build(leaf: str, pretrained: Path, **test_cfg) -> torch.nn.Module:
    """A model whose dispatchers choose different tokens in every image and layer."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(shrunk(leaf, pretrained, **test_cfg)).eval()
    for branch in dynamic_branches(model).values():
        torch.nn.init.normal_(branch.dispatcher.gate.weight)
    return model


@pytest.fixture
def config(tmp_path, tiny_config, leaf, pretrained) -> Path:
    """The tiny config with the leaf's model."""
    cfg = Config.fromfile(tiny_config, import_custom_modules=False)
    cfg.model = shrunk(leaf, pretrained)
    cfg.param_scheduler = []
    path = tmp_path / f'{leaf}.py'
    cfg.dump(path)
    return path


def metrics(work_dir: Path) -> dict:
    """What a test leaves."""
    (file,) = work_dir.glob('*/*.json')
    return json.loads(file.read_text())


LONG = [name if name.startswith('linear') else pytest.param(name, marks=pytest.mark.slow) for name in HEADS]


@pytest.mark.parametrize('leaf', LONG, indirect=True)
def test_it_trains_and_is_tested_with_windows_and_views(config, tmp_path, leaf, pretrained, run_tool):
    run_tool('train', config, '--work-dir', tmp_path / 'run', '--cfg-options', *SHORT)
    (log,) = (tmp_path / 'run').glob('*/vis_data/scalars.json')
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [row for row in rows if 'loss' in row]
    assert len(losses) == 2 and all(math.isfinite(row['loss']) for row in losses)
    assert ('aux.loss_ce' in losses[0]) == leaf.startswith('upernet') and 'loss_rate' in losses[0]
    checkpoint = tmp_path / 'run/iter_2.pth'
    trained, start = torch.load(checkpoint)['state_dict'], torch.load(pretrained)['state_dict']
    assert all(torch.equal(trained[name], start[name]) for name in start if name.startswith('backbone.layers'))
    assert ('backbone.ln1.weight' in trained) == (not leaf.startswith('upernet'))
    run_tool('test', config, checkpoint, '--work-dir', tmp_path / 'whole')
    whole = metrics(tmp_path / 'whole')
    last = [row for row in rows if 'mIoU' in row][-1]
    assert (whole['mIoU'], whole['gmacs']) == (last['mIoU'], last['gmacs'])
    slide = 'model.test_cfg.mode=slide', 'model.test_cfg.crop_size=(64,64)', 'model.test_cfg.stride=(32,32)'
    run_tool('test', config, checkpoint, '--work-dir', tmp_path / 'slide', '--cfg-options', *slide)
    run_tool('test', config, checkpoint, '--work-dir', tmp_path / 'tta', '--tta')
    windows, views = metrics(tmp_path / 'slide'), metrics(tmp_path / 'tta')
    assert windows['gmacs'] > whole['gmacs'] and views['gmacs'] > 2 * whole['gmacs']
    assert all(report['gmacs'] < report['gmacs_dense'] * 1.2 and 'mIoU' in report for report in (windows, views))


@pytest.mark.parametrize('leaf', [name for name in HEADS if not name.startswith('upernet')], indirect=True)
@pytest.mark.parametrize(
    'method',
    [pytest.param('adapter', marks=pytest.mark.slow), pytest.param('lora', marks=pytest.mark.slow), 'evidence'],
)
def test_methods_train_with_it(config, tmp_path, method, run_tool):
    options = ['--method', method, '--cfg-options', 'train_cfg.val_interval=6', 'default_hooks.checkpoint.interval=6']
    run_tool('train', config, '--work-dir', tmp_path / 'run', *options)
    run_tool('test', config, tmp_path / 'run/iter_6.pth', '--work-dir', tmp_path / 'test', '--method', method)
    report = metrics(tmp_path / 'test')
    assert ('activation_rate' in report) == (method == 'evidence')
    if method == 'evidence':
        assert report['activation_rate'] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize('test_cfg', [dict(mode='whole'), SLIDE], ids=['whole', 'slide'])
def test_neck_and_head_cost_what_an_operator_counter_sees_on_real_features(leaf, pretrained, test_cfg):
    model, images = build(leaf, pretrained, **test_cfg), torch.randn(2, 3, 64, 96)
    passes = []
    model.backbone.register_forward_hook(lambda backbone, args, features: passes.append(features))
    with CostCounter(model) as counter, torch.no_grad():
        counter.add_images(len(model.predict(images)))
    report = counter.report()
    assert 0 < report['activation_rate'] < 1
    ran = sum(count_macs(lambda f=f: model.decode_head(model.neck(f) if model.with_neck else f)) for f in passes)
    assert len(passes) == (2 if test_cfg == SLIDE else 1) and ran > 0
    assert (report['gmacs'] - report['gmacs_backbone']) * 2e9 == pytest.approx(ran, rel=1e-9)
    assert (report['gmacs_dense'] - report['gmacs_backbone_dense']) * 2e9 == pytest.approx(ran, rel=1e-9)


@torch.no_grad()
def test_packed_equals_masked_in_every_window(leaf, pretrained):
    model, images = build(leaf, pretrained, **SLIDE), torch.randn(1, 3, 64, 96)
    with record_dispatch(model) as record:
        packed = model.predict(images)[0].seg_logits.data
    assert [len(passes) for passes in record.dispatches.values()] == [2] * 4
    for branch in dynamic_branches(model).values():
        branch.inference = 'masked'
    masked = model.predict(images)[0].seg_logits.data
    assert packed.shape == (3, 64, 96)
    torch.testing.assert_close(packed, masked, rtol=0, atol=1e-5 * float(masked.abs().max()))
