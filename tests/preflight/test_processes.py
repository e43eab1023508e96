"""Launchers, runners, strategies and model wrappers: honoured, or refused before anything is written."""

import re
from argparse import Namespace

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import FlexibleRunner, Runner

from mmdyt.preflight import build_runner, load_config
from mmdyt.preflight.processes import check_launcher, check_runner, is_flexible, keep_wrapper, use_cpu_processes

FLEXIBLE = dict(runner_type='FlexibleRunner')
VARIABLES = ('WORLD_SIZE', 'OMPI_COMM_WORLD_SIZE', 'RANK')


@pytest.fixture
def environment(monkeypatch):
    """``environment(WORLD_SIZE='2')`` is all that a launcher has set."""

    def use(**variables) -> None:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return use


@pytest.mark.parametrize(
    ('variables', 'launcher', 'message'),
    [
        (
            dict(WORLD_SIZE='2', RANK='0'),
            'none',
            r'WORLD_SIZE must be 1 without --launcher, got 2\. .* --launcher pytorch',
        ),
        (dict(OMPI_COMM_WORLD_SIZE='4'), 'none', r'OMPI_COMM_WORLD_SIZE must be 1 without --launcher, got 4\. .* mpi'),
        (dict(), 'pytorch', r'RANK must be set with --launcher pytorch, got none\. Start with torchrun'),
    ],
)
def test_processes_that_do_not_know_of_each_other_are_refused(environment, variables, launcher, message):
    environment(**variables)
    with pytest.raises(ValueError, match=message):
        check_launcher(launcher)


@pytest.mark.parametrize(
    ('variables', 'launcher'),
    [
        (dict(), 'none'),
        (dict(WORLD_SIZE='1', RANK='0'), 'none'),
        (dict(WORLD_SIZE='', OMPI_COMM_WORLD_SIZE='many'), 'none'),
        (dict(WORLD_SIZE='2', RANK='0'), 'pytorch'),
        (dict(OMPI_COMM_WORLD_SIZE='2'), 'mpi'),
        (dict(), 'slurm'),
    ],
)
def test_other_environments_pass(environment, variables, launcher):
    environment(**variables)
    check_launcher(launcher)


def test_tools_refuse_them_before_they_read_anything(environment):
    environment(WORLD_SIZE='2')
    with pytest.raises(ValueError, match='WORLD_SIZE'):
        load_config(Namespace(config='no.py', launcher='none'))


def test_a_tool_that_torchrun_started_without_a_launcher_writes_nothing(
    environment, tiny_config, run_tool, tmp_path, capfd
):
    environment(WORLD_SIZE='2', RANK='0')
    with pytest.raises(SystemExit) as exit_info:
        run_tool('train', tiny_config, '--work-dir', tmp_path / 'work_dir')
    assert exit_info.value.code == 2 and not list(tmp_path.iterdir())
    assert re.match('error: WORLD_SIZE must be 1', capfd.readouterr().err)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(runner_type='FlexibelRunner'), "runner_type .* got 'FlexibelRunner'. Did you mean FlexibleRunner"),
        (dict(strategy=dict(type='DDPStrategy')), "strategy must come with runner_type='FlexibleRunner', got 'Runner'"),
        (
            FLEXIBLE | dict(strategy=dict(type='DPStrategy')),
            "strategy.type .* got 'DPStrategy'. Did you mean DDPStrategy",
        ),
        (FLEXIBLE | dict(strategy=dict(sync_bn='torch')), 'strategy.type must be a registered strategy, got None'),
        (FLEXIBLE | dict(strategy=dict(type='DeepSpeedStrategy')), "got 'DeepSpeedStrategy' without deepspeed"),
        (FLEXIBLE | dict(model_wrapper_cfg=dict(type='x')), 'model_wrapper_cfg must be part of strategy.model_wrapper'),
        (FLEXIBLE | dict(find_unused_parameters=True), 'find_unused_parameters must be part of strategy.model_wrapper'),
        (FLEXIBLE | dict(strategy=dict(type='FSDPStrategy')), 'must have use_orig_params=True with FSDPStrategy'),
        (
            dict(model_wrapper_cfg=dict(type='mmdyt.FrozenShardedDataParallel'), custom_hooks=[dict(type='EMAHook')]),
            'custom_hooks must hold no EMAHook with mmdyt.FrozenShardedDataParallel',
        ),
    ],
)
def test_what_a_runner_would_ignore_or_not_find_is_refused(options, message, monkeypatch):
    monkeypatch.setattr('mmdyt.preflight.processes.find_spec', lambda name: None)
    with pytest.raises(ValueError, match=message):
        check_runner(Config(options))


@pytest.mark.parametrize('stage', [0, 1, 2, 3])
def test_deepspeed_must_not_share_out_weights_by_itself(monkeypatch, stage):
    monkeypatch.setattr('mmdyt.preflight.processes.find_spec', lambda name: object())
    cfg = Config(FLEXIBLE | dict(strategy=dict(type='DeepSpeedStrategy', zero_optimization=dict(stage=stage))))
    if stage < 3:
        check_runner(cfg)
        return
    with pytest.raises(ValueError, match='stage must be at most 2, got 3.* Take model_wrapper_cfg'):
        check_runner(cfg)


class Patient(Runner):
    """A runner of the user's own."""


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(runner_type='Runner'),
        dict(runner_type=Patient),
        FLEXIBLE,
        FLEXIBLE | dict(find_unused_parameters=False),
        FLEXIBLE | dict(strategy=dict(type='DDPStrategy')),
        FLEXIBLE | dict(strategy=dict(type='FSDPStrategy', model_wrapper=dict(use_orig_params=True))),
        dict(model_wrapper_cfg=dict(type='mmdyt.FrozenShardedDataParallel')),
        dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel'), find_unused_parameters=True),
    ],
    ids=str,
)
def test_what_mmengine_accepts_passes(options):
    check_runner(Config(options))


@pytest.mark.parametrize(
    ('options', 'kind'), [(dict(), Runner), (FLEXIBLE, FlexibleRunner), (dict(runner_type=Patient), Patient)]
)
def test_the_runner_is_the_one_that_the_config_names(monkeypatch, options, kind):
    monkeypatch.setattr(kind, 'from_cfg', classmethod(lambda cls, cfg: cls))
    assert build_runner(Config(options)) is kind
    assert is_flexible(Config(options)) == (kind is FlexibleRunner)


class NoDDP(torch.nn.Module):
    """A wrapper of the user's own, which takes no devices."""


@pytest.fixture
def processes(monkeypatch):
    """``use_cpu_processes`` without processes."""
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend: None)
    monkeypatch.setattr('mmdyt.preflight.processes.atexit.register', lambda function: None)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setitem(MODEL_WRAPPERS.module_dict, 'NoDDP', NoDDP)


PLAIN = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False, find_unused_parameters=False)


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (dict(), PLAIN),
        (dict(find_unused_parameters=True), PLAIN | dict(find_unused_parameters=True)),
        (
            dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel', static_graph=True)),
            dict(type='MMDistributedDataParallel', static_graph=True, device_ids=None),
        ),
        (
            dict(model_wrapper_cfg=dict(broadcast_buffers=True), find_unused_parameters=True),
            dict(PLAIN, broadcast_buffers=True, find_unused_parameters=True),
        ),
        (
            dict(model_wrapper_cfg=dict(find_unused_parameters=False), find_unused_parameters=True),
            dict(type='MMDistributedDataParallel', find_unused_parameters=False, device_ids=None),
        ),
        (dict(model_wrapper_cfg=dict(type='NoDDP'), find_unused_parameters=True), dict(type='NoDDP')),
    ],
    ids=str,
)
def test_the_users_wrapper_is_kept_in_processes_without_gpus(processes, options, expected):
    cfg = Config(dict(model=dict()) | options)
    keep_wrapper(cfg)
    use_cpu_processes(cfg)
    assert dict(cfg.model_wrapper_cfg) == expected


@pytest.mark.parametrize(
    ('strategy', 'expected'),
    [
        (None, dict(type='MMDistributedDataParallel', broadcast_buffers=False, device_ids=None)),
        (
            dict(type='DDPStrategy', model_wrapper=dict(find_unused_parameters=True)),
            dict(type='MMDistributedDataParallel', find_unused_parameters=True, device_ids=None),
        ),
        (dict(type='FSDPStrategy'), None),
    ],
)
def test_so_is_that_of_a_strategy(processes, strategy, expected):
    cfg = Config(dict(model=dict(), **FLEXIBLE) | ({} if strategy is None else dict(strategy=strategy)))
    use_cpu_processes(cfg)
    assert cfg.strategy.get('model_wrapper') == expected and 'model_wrapper_cfg' not in cfg


def test_a_flexible_runner_trains_and_tests(run_tool, tiny_cls_config, tmp_path, capfd):
    options = '--cfg-options', 'runner_type=FlexibleRunner', 'train_cfg.max_epochs=1', 'train_cfg.val_interval=1'
    options += ('default_hooks.checkpoint.interval=1',)
    run_tool('train', tiny_cls_config, '--work-dir', tmp_path, *options)
    test = 'test', tiny_cls_config, tmp_path / 'epoch_1.pth', '--work-dir', tmp_path / 'test'
    run_tool(*test, *options)
    assert list((tmp_path / 'test').glob('*/*.json'))
    capfd.readouterr()
    with pytest.raises(SystemExit):
        run_tool(*test, '--complete', *options)
    assert 'runner_type must be Runner with --complete' in capfd.readouterr().err


def test_a_strategy_that_shards_is_told_of_the_cpu(processes):
    cfg = Config(
        dict(model=dict(), strategy=dict(type='FSDPStrategy', model_wrapper=dict(use_orig_params=True))) | FLEXIBLE
    )
    use_cpu_processes(cfg)
    assert dict(cfg.strategy.model_wrapper) == dict(use_orig_params=True, device_id=torch.device('cpu'))
