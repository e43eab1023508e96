"""The temperature of the dispatchers follows its schedule, in a runner, resumed or not."""

import json
import math
from types import SimpleNamespace

import pytest
import torch.nn as nn
from conftest import ROOT
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import HOOKS, MODELS

from mmdyt.engine import TauScheduleHook
from mmdyt.engine.tau import tau_at
from mmdyt.parts.dispatcher import RandomDispatcher, SampleDispatcher, TokenDispatcher

CONFIG = """
_base_ = '{base}'
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='mmdyt.TauScheduleHook', start=4.0, end=0.25, by='exponential'),
]
"""


def run(hook: TauScheduleHook, model: nn.Module, first: int, stop: int, max_iters: int) -> list[float]:
    """What the hook logs, and sets, from iteration ``first`` to ``stop`` of ``max_iters``."""
    hub = MessageHub.get_instance(f'test_tau_{first}')
    runner = SimpleNamespace(model=model, iter=first, max_iters=max_iters, message_hub=hub)
    hook.before_train(runner)
    values = []
    for runner.iter in range(first, stop):
        hook.before_train_iter(runner, batch_idx=0)
        values.append(hub.get_scalar('train/tau').current())
        assert {m.tau for m in model.modules() if isinstance(m, TokenDispatcher)} == {values[-1]}
    return values


def dispatchers() -> nn.Module:
    return nn.ModuleList([TokenDispatcher(4), nn.Linear(4, 4), SampleDispatcher(4), RandomDispatcher(4)])


@pytest.fixture
def config(tmp_path, tiny_config):
    path = tmp_path / 'tau.py'
    path.write_text(CONFIG.format(base=tiny_config))
    return path


def logged(work_dir) -> list[float]:
    """Temperature of every iteration of all runs in a work dir."""
    lines = [line for log in sorted(work_dir.glob('*/vis_data/scalars.json')) for line in log.read_text().splitlines()]
    return [row['tau'] for row in map(json.loads, lines) if 'loss' in row]


@pytest.mark.parametrize(
    ('by', 'quarter', 'middle'),
    [
        ('linear', 0.75 * 5 + 0.25 * 0.1, (5 + 0.1) / 2),
        ('exponential', 5 * (0.1 / 5) ** 0.25, math.sqrt(5 * 0.1)),
        ('cosine', 0.1 + (5 - 0.1) * (2 + math.sqrt(2)) / 4, (5 + 0.1) / 2),
    ],
)
def test_values_of_each_shape(by, quarter, middle):
    assert tau_at(0.0, 5.0, 0.1, by) == 5.0 and tau_at(1.0, 5.0, 0.1, by) == 0.1  # exactly
    assert tau_at(0.25, 5.0, 0.1, by) == pytest.approx(quarter)
    assert tau_at(0.5, 5.0, 0.1, by) == pytest.approx(middle)


@pytest.mark.parametrize('by', ['linear', 'exponential', 'cosine'])
@pytest.mark.parametrize(('start', 'end'), [(5.0, 0.1), (0.1, 5.0)])
def test_from_the_first_iteration_to_the_last(by, start, end):
    values = run(TauScheduleHook(start, end, by), dispatchers(), 0, 9, max_iters=9)
    assert (values[0], values[-1]) == (start, end)
    assert values == sorted(values, reverse=start > end) and len(set(values)) == 9


def test_defaults_fall_linearly_from_5_to_a_tenth():
    assert run(TauScheduleHook(), dispatchers(), 0, 3, max_iters=3) == [5.0, pytest.approx(2.55), 0.1]


def test_equal_ends_are_a_constant():
    for by in ('linear', 'exponential', 'cosine'):
        assert run(TauScheduleHook(5.0, 5.0, by), dispatchers(), 0, 5, 5) == pytest.approx([5.0] * 5)


def test_one_iteration_is_the_first():
    assert run(TauScheduleHook(), dispatchers(), 0, 1, max_iters=1) == [5.0]


@pytest.mark.parametrize('by', ['linear', 'exponential', 'cosine'])
def test_a_resumed_schedule_goes_on_where_it_stopped(by):
    unbroken = run(TauScheduleHook(by=by), dispatchers(), 0, 7, max_iters=7)
    assert len(set(unbroken)) == 7
    assert run(TauScheduleHook(by=by), dispatchers(), 3, 7, max_iters=7) == unbroken[3:]


def test_wrapped_models_are_scheduled():
    wrapped = nn.Module()
    wrapped.module = dispatchers()  # as MMDistributedDataParallel holds it
    assert run(TauScheduleHook(), wrapped, 0, 2, max_iters=2) == [5.0, 0.1]


@pytest.mark.parametrize('value', [0, -1.0, math.inf, math.nan])
def test_temperatures_must_be_positive_and_finite(value):
    for name in ('start', 'end'):
        with pytest.raises(ValueError, match=f'^{name} must be a positive number, got {value}'):
            TauScheduleHook(**{name: value})


def test_unknown_shapes_are_refused():
    with pytest.raises(ValueError, match=r"^by must be one of \['linear', 'exponential', 'cosine'\], got 'step'"):
        TauScheduleHook(by='step')


def test_a_model_without_dispatchers_is_refused_before_training():
    hook, runner = TauScheduleHook(), SimpleNamespace(model=nn.ModuleList([RandomDispatcher(4)]))
    with pytest.raises(ValueError, match='^model must have a mmdyt.TokenDispatcher .*, got none'):
        hook.before_train(runner)


def test_training_follows_the_schedule_and_resumes_it(run_tool, config, tmp_path):
    expected = [4.0 * (0.25 / 4.0) ** (i / 5) for i in range(6)]
    run_tool('train', config, '--work-dir', tmp_path / 'work_dir')
    assert logged(tmp_path / 'work_dir') == pytest.approx(expected)
    (log,) = (tmp_path / 'work_dir').glob('*/*.log')
    assert 'tau: 4.0000' in log.read_text() and 'tau: 0.2500' in log.read_text()
    run_tool('train', config, '--work-dir', tmp_path / 'resumed', '--resume', tmp_path / 'work_dir' / 'iter_3.pth')
    assert logged(tmp_path / 'resumed') == pytest.approx(expected[3:])


def test_every_dispatcher_of_a_real_model_is_reached(tiny_model_cfg):
    model = MODELS.build(tiny_model_cfg)
    run(TauScheduleHook(), model, 0, 2, max_iters=2)
    assert [m.tau for m in model.modules() if isinstance(m, TokenDispatcher)] == [0.1] * 4


def test_the_config_adds_the_hook_and_keeps_the_others():
    cfg = Config.fromfile(ROOT / 'configs/dyt/vitti_tau_schedule_cifar100_1k.py', import_custom_modules=False)
    base = Config.fromfile(ROOT / 'configs/dyt/vitti_cifar100_1k.py', import_custom_modules=False)
    assert cfg.custom_hooks[:-1] == base.custom_hooks
    hook = HOOKS.build(cfg.custom_hooks[-1])
    assert (hook.start, hook.end, hook.by) == (cfg.model.backbone.dispatcher.tau, 0.1, 'linear')
