import logging
from types import SimpleNamespace

import pytest
import torch.nn as nn
from mmengine.registry import HOOKS

import mmdyt.engine  # noqa: F401  registers
from mmdyt.core.part import Delta, Dispatcher


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
