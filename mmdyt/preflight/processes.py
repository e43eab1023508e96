"""Which runner, and how many processes: launchers, runners and strategies, distributed runs without GPUs."""

import atexit
import logging
import os
import sys
from importlib.util import find_spec

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import MODEL_WRAPPERS, RUNNERS, STRATEGIES
from mmengine.runner import FlexibleRunner, Runner
from torch.nn.parallel import DistributedDataParallel

from .names import name_of, near

STARTED = ('WORLD_SIZE', 'OMPI_COMM_WORLD_SIZE')  # torchrun's and mpirun's
NEEDS = dict(DeepSpeedStrategy='deepspeed.runtime.fp16.onebit', ColossalAIStrategy='colossalai')
SHARED = 'FrozenShardedDataParallel'
DDP = 'MMDistributedDataParallel'


def check_launcher(launcher: str) -> None:
    """Refuse several processes that do not know of each other, and a launcher that launched nothing.

    Raises:
        ValueError: Naming the variable of the environment.
    """
    for name in STARTED:
        number = os.environ.get(name, '')
        if launcher == 'none' and number.isdecimal() and int(number) > 1:
            raise ValueError(
                f'{name} must be 1 without --launcher, got {number}. Each process would write over the files of the '
                'others: add --launcher pytorch (torchrun), slurm or mpi, or start one process.'
            )
    if launcher == 'pytorch' and 'RANK' not in os.environ:
        raise ValueError(
            'RANK must be set with --launcher pytorch, got none. Start with torchrun, tools/dist_train.sh or '
            'tools/dist_test.sh.'
        )


def check_runner(cfg: Config) -> None:
    """Refuse a runner or strategy that is unknown, or that would ignore a part of the config.

    Raises:
        ValueError: Naming the setting.
    """
    kind, strategy = cfg.get('runner_type', 'Runner'), cfg.get('strategy')
    runner = _find(RUNNERS, kind)
    if runner is None:
        raise ValueError(
            f'runner_type must be a registered runner, got {kind!r}.{near(kind, list(RUNNERS.module_dict))}'
        )
    if strategy is not None and issubclass(runner, Runner):
        raise ValueError(f"strategy must come with runner_type='FlexibleRunner', got {kind!r}, which ignores it.")
    if strategy is not None:
        name = strategy.get('type')
        if _find(STRATEGIES, name) is None:
            known = near(str(name), list(STRATEGIES.module_dict))
            raise ValueError(f'strategy.type must be a registered strategy, got {name!r}.{known}')
        if name in NEEDS and not _is_there(NEEDS[name]):
            raise ValueError(f'strategy.type must be one that is installed, got {name!r} without {NEEDS[name]}.')
        _check_strategy(strategy)
    hooks = [*(cfg.get('default_hooks') or {}).values(), *(cfg.get('custom_hooks') or [])]
    kinds = [name_of(hook.get('type')) for hook in hooks if isinstance(hook, dict)]
    if issubclass(runner, FlexibleRunner) and any(name.endswith('TunedCheckpointHook') for name in kinds):
        raise ValueError(f'runner_type must be Runner with mmdyt.TunedCheckpointHook, got {kind}.')
    wrapper = name_of((cfg.get('model_wrapper_cfg') or {}).get('type'))
    if wrapper.endswith(SHARED) and any(name.endswith('EMAHook') for name in kinds):
        raise ValueError(f'custom_hooks must hold no EMAHook with {wrapper}, got one: it averages whole weights.')
    for name in ('model_wrapper_cfg', 'find_unused_parameters'):
        if cfg.get(name) and issubclass(runner, FlexibleRunner):
            raise ValueError(
                f'{name} must be part of strategy.model_wrapper with {kind}, which ignores it elsewhere, got '
                f'{cfg.get(name)}.'
            )


def _check_strategy(strategy: dict) -> None:
    """Refuse what cannot train parts of a frozen network."""
    name, wrapper = strategy['type'], strategy.get('model_wrapper') or {}
    if name == 'FSDPStrategy' and not wrapper.get('use_orig_params'):
        raise ValueError(
            'strategy.model_wrapper must have use_orig_params=True with FSDPStrategy, where frozen and tuned weights '
            f'lie side by side, got {wrapper}.'
        )
    stage = (strategy.get('zero_optimization') or {}).get('stage', 0)
    if name == 'DeepSpeedStrategy' and stage > 2:
        raise ValueError(
            f'strategy.zero_optimization.stage must be at most 2, got {stage}: parts read frozen weights where stage 3 '
            f"has not gathered them. Take model_wrapper_cfg=dict(type='mmdyt.{SHARED}'), which does that."
        )


def _is_there(module: str) -> bool:
    """Whether a module can be imported, whose packages may be missing, too."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def build_runner(cfg: Config) -> Runner | FlexibleRunner:
    """The runner of the config's ``runner_type``, mmengine's ``Runner`` by default."""
    return RUNNERS.build(cfg)


def is_flexible(cfg: Config) -> bool:
    """Whether the config asks for mmengine's ``FlexibleRunner``, whose model is built when it runs."""
    return issubclass(_find(RUNNERS, cfg.get('runner_type', 'Runner')), FlexibleRunner)


def keep_wrapper(cfg: Config) -> None:
    """Let a ``model_wrapper_cfg`` have the config's ``find_unused_parameters``, which mmengine drops beside it."""
    wrapper = cfg.get('model_wrapper_cfg')
    if wrapper is not None and 'find_unused_parameters' in cfg and _is_ddp(wrapper):
        wrapper.setdefault('find_unused_parameters', cfg.find_unused_parameters)


def use_cpu_processes(cfg: Config) -> None:
    """Prepare a distributed run without GPUs: mmengine's own set-up and SyncBN insist on CUDA devices."""
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    torch.distributed.init_process_group(backend='gloo')
    # gloo's threads abort the process if they are still there when the interpreter ends
    atexit.register(torch.distributed.destroy_process_group)
    if is_flexible(cfg):
        cfg.setdefault('strategy', dict(type='DDPStrategy'))
        if cfg.strategy.type == 'DDPStrategy':
            cfg.strategy.model_wrapper = _on_cpu(cfg.strategy.get('model_wrapper'))
        elif cfg.strategy.type == 'FSDPStrategy' and cfg.strategy.get('model_wrapper'):
            cfg.strategy.model_wrapper.setdefault('device_id', torch.device('cpu'))
    else:
        unused = cfg.get('find_unused_parameters', False)
        cfg.model_wrapper_cfg = _on_cpu(cfg.get('model_wrapper_cfg'), find_unused_parameters=unused)
    if _replace_type(cfg.model, 'SyncBN', 'BN'):
        print_log('No GPU: SyncBN became BN, so each process normalises its own images.', level=logging.WARNING)


def _on_cpu(wrapper: dict | None, **default) -> dict:
    """The user's wrapper or mmengine's, without the device that mmengine would give it."""
    wrapper = dict(broadcast_buffers=False, **default) if wrapper is None else dict(wrapper)
    wrapper.setdefault('type', DDP)
    return wrapper | dict(device_ids=None) if _is_ddp(wrapper) else wrapper


def _is_ddp(wrapper: dict) -> bool:
    """Whether torch's ``DistributedDataParallel`` takes the wrapper's arguments."""
    kind = _find(MODEL_WRAPPERS, wrapper.get('type', DDP))
    return kind is not None and issubclass(kind, DistributedDataParallel)


def _find(registry, kind) -> type | None:
    """A class, or the one of this name."""
    return kind if isinstance(kind, type) else registry.get(kind) if isinstance(kind, str) else None


def end_cpu_processes() -> None:
    """End a distributed run without GPUs that has done its work; nothing to do for others.

    Now and then a thread of gloo outlives its group, and the interpreter's own end would abort the process over it. So
    the process leaves without that end, once all that it wrote is on disk.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_backend() != 'gloo':
        return
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _replace_type(node, old: str, new: str) -> int:
    """Rename a ``type`` everywhere in a config; return how often."""
    if isinstance(node, list | tuple):
        return sum(_replace_type(value, old, new) for value in node)
    if not isinstance(node, dict):
        return 0
    here = int(node.get('type') == old)
    if here:
        node['type'] = new
    return here + sum(_replace_type(value, old, new) for value in node.values())
