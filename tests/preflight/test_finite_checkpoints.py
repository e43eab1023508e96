"""Checkpoints that are not finite are refused wherever one is read, and what only looks so is not."""

import copy

import pytest
import torch
from conftest import TINY_ARCH
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import mmdyt.models.classifier  # noqa: F401  repairs the wheels, registers
from mmdyt.core.observe import dynamic_branches
from mmdyt.preflight.check import check
from mmdyt.preflight.checkpoints import check_fit, check_resumable

NAN, INF = float('nan'), float('inf')
VIT = dict(type='mmdyt.DyTVisionTransformer', arch=dict(TINY_ARCH, num_layers=1), img_size=32, patch_size=16)
MODEL = dict(
    type='mmdyt.DyTImageClassifier',
    data_preprocessor=dict(type='mmdyt.ImagePreprocessor', num_classes=2),
    backbone=VIT,
    head=dict(type='VisionTransformerClsHead', num_classes=2, in_channels=32),
)
DISPATCHER = 'backbone.layers.0.dynamic.mlp.dispatcher'


def build(cfg: dict = MODEL) -> torch.nn.Module:
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(copy.deepcopy(cfg))


@pytest.mark.parametrize('exact', [True, False], ids=['test or resume', 'load_from'])
@pytest.mark.parametrize(
    ('name', 'value', 'refused'),
    [
        ('backbone.layers.0.ffn.layers.0.0.weight', NAN, True),
        ('backbone.layers.0.ffn.layers.0.0.weight', INF, True),
        ('backbone.layers.0.ffn.layers.0.0.weight', -INF, True),
        ('backbone.layers.0.dynamic.mlp.adapter.up.weight', NAN, True),
        (f'{DISPATCHER}.gate.bias', -INF, True),
        (f'{DISPATCHER}.threshold', NAN, True),
        (f'{DISPATCHER}.threshold', -INF, False),  # every token runs, as before a fit
        ('head.layers.head.bias', NAN, True),
        ('head.layers.head.bias', 1e30, False),
    ],
)
def test_weights_that_are_not_finite_are_refused(name, value, refused, exact):
    model = build()
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tensors[name].view(-1)[-1] = value
    if not refused:
        check_fit(model, tensors, 'a.pth', exact=exact)
        return
    expected = (
        f'^checkpoint must hold finite numbers, got NaN or infinity in 1 of its weights, first {name}: a.pth. Training '
        'had diverged: take an earlier checkpoint.$'
    )
    with pytest.raises(ValueError, match=expected):
        check_fit(model, tensors, 'a.pth', exact=exact)


def test_what_the_model_does_not_load_may_be_anything():
    model = build()
    tensors = {f'backbone.{name}': t for name, t in model.backbone.state_dict().items()}
    check_fit(model, tensors | {'old_head.weight': torch.full((2,), NAN)}, 'a.pth', exact=False)


def test_a_capacity_that_is_no_number_is_refused():
    model = build()
    for branch in dynamic_branches(model).values():
        branch.dispatcher.set_rule(capacity=0.5)
    tensors = model.state_dict() | {f'{DISPATCHER}.capacity': torch.tensor(NAN, dtype=torch.float64)}
    with pytest.raises(ValueError, match='first .*capacity: a.pth'):
        check_fit(model, tensors, 'a.pth', exact=True)


@pytest.mark.parametrize(
    ('part', 'value', 'refused'),
    [
        ('optimizer', NAN, True),
        ('optimizer', INF, True),
        ('ema_state_dict', NAN, True),
        ('ema_state_dict', -INF, False),  # a threshold
        ('optimizer', 1e30, False),
        ('message_hub', NAN, False),  # a loss that was tolerated, in the log
    ],
)
def test_a_state_of_training_that_is_not_finite_is_refused(tmp_path, part, value, refused):
    checkpoint = dict(meta=dict(config=''), state_dict=dict(a=torch.ones(1)), message_hub={}, optimizer={})
    spoilt = torch.tensor([1.0, value])
    checkpoint[part] = dict(
        optimizer=dict(state={0: dict(step=torch.ones(()), exp_avg_sq=spoilt)}),
        ema_state_dict=dict(steps=torch.tensor(3), threshold=spoilt),
        message_hub=dict(losses=spoilt),
    )[part]
    path = tmp_path / 'a.pth'
    torch.save(checkpoint, path)
    if not refused:
        check_resumable(str(path))
        return
    with pytest.raises(ValueError, match=r'in 1 of its state of training, first .*(exp_avg_sq|threshold): '):
        check_resumable(str(path))


@pytest.mark.parametrize('way', ['test', 'load_from', 'init_cfg'])
def test_the_tools_refuse_them_before_work_starts(tiny_cls_config, tmp_path, way):
    cfg = Config.fromfile(tiny_cls_config)
    cfg.launcher = 'none'
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        tensors = MODELS.build(copy.deepcopy(cfg.model)).state_dict()
    tensors['backbone.cls_token'][0, 0, 0] = NAN
    path = str(tmp_path / 'nan.pth')
    torch.save(dict(state_dict=tensors), path)
    if way == 'init_cfg':
        cfg.model.backbone.init_cfg.checkpoint = path
    else:
        cfg.load_from = path
    with pytest.raises(
        ValueError, match='^checkpoint must hold finite numbers, got NaN or infinity in 1 of its weights'
    ):
        check(cfg, loops=('test',) if way == 'test' else ('train', 'val'))
