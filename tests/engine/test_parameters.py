import logging
from types import SimpleNamespace

import pytest
import torch.nn as nn
from conftest import TINY_ARCH
from mmengine.config import Config
from mmengine.registry import HOOKS

import mmdyt.engine  # noqa: F401  registers
import mmdyt.models.classifier  # noqa: F401  registers
from mmdyt.core.part import Delta, Dispatcher
from mmdyt.engine.parameters import count_tuned


class Adapter(nn.Linear, Delta):
    word = 'adapter'


class Gate(nn.Linear, Dispatcher):
    pass


@pytest.mark.parametrize('wrap', [nn.Identity, nn.DataParallel])
def test_the_report_says_what_is_tuned(caplog, wrap):
    sizes = dict(base=(nn.Linear, 500), adapter=(Adapter, 30), dispatcher=(Gate, 10), head=(nn.Linear, 40))
    model = nn.ModuleDict({name: kind(1000, size, bias=False) for name, (kind, size) in sizes.items()})
    model.base.requires_grad_(False)
    runner = SimpleNamespace(model=model if wrap is nn.Identity else wrap(model), logger=logging.getLogger('report'))
    with caplog.at_level(logging.INFO, logger='report'):
        HOOKS.build(dict(type='mmdyt.ParameterReportHook')).before_train(runner)
    assert caplog.messages == [
        'Parameters (M): 0.080 tuned (adapters 0.030, dispatchers 0.010, everything else 0.040), 0.500 frozen.'
    ]


C, DEPTH, CLASSES = TINY_ARCH['embed_dims'], TINY_ARCH['num_layers'], 5
HEAD = CLASSES * (C + 1)


@pytest.mark.parametrize(
    ('options', 'backbone'),
    [
        (dict(), 0),
        (dict(adapter=dict(type='mmdyt.Adapter', bottleneck=4)), DEPTH * (2 * 4 * C + 4 + C)),
        (dict(tuned=['pos_embed']), 5 * C),  # a class token and 2 x 2 patches
    ],
)
def test_trained_parameters_of_a_config_are_counted_in_backbone_and_head(options, backbone):
    plain = dict(adapter=None, dispatcher=None)
    vit = dict(type='mmdyt.DyTVisionTransformer', arch=dict(TINY_ARCH), img_size=32, patch_size=16) | plain | options
    head = dict(type='VisionTransformerClsHead', num_classes=CLASSES, in_channels=C)
    model = dict(type='mmdyt.DyTImageClassifier', backbone=vit, head=head)
    assert count_tuned(Config(dict(default_scope='mmpretrain', model=model))) == dict(tuned=backbone, head=HEAD)
