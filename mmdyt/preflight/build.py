"""Build what a run will build, in the order in which it does, and throw it away: nothing is written or begun."""

import copy
import logging
import os
import random
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from inspect import signature
from multiprocessing import get_all_start_methods
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop, Runner, TestLoop, ValLoop
from mmengine.utils import ManagerMixin
from torch.utils.data import DataLoader

from mmdyt.core.options import is_integer, is_number

from .datasets import fetches_itself, nested
from .dry_run import HOSTS, check_metrics, run_evaluation, run_training, run_update
from .keys import check_paramwise, own_keys
from .loops import check_ends, check_lengths, check_not_empty
from .names import near
from .refusals import part

NAME = 'preflight'  # of what mmengine keeps by name
# arguments that name a file or folder which metrics, hooks and visualizers write: some make it when they are built
WRITTEN = re.compile(r'out|output|(out|output|outfile|save|dump|result)_?(file)?_?(path|dir|prefix|file)')
# what a visualization backend imports only when it begins to write
PACKAGES = dict(TensorboardVisBackend='tensorboard', WandbVisBackend='wandb', MLflowVisBackend='mlflow',
                ClearMLVisBackend='clearml', NeptuneVisBackend='neptune', DVCLiveVisBackend='dvclive',
                AimVisBackend='aim')  # fmt: skip


@contextmanager
def untouched() -> Iterator[Path]:
    """A folder to write to, for a while in which nothing else is: random numbers, mmengine's named objects, logs."""
    named = {kind: kind._instance_dict.copy() for kind in _named_kinds()}
    python, numpy, cudnn = random.getstate(), np.random.get_state(), torch.backends.cudnn
    flags = cudnn.benchmark, cudnn.deterministic
    with (
        torch.cuda.device(int(os.environ.get('LOCAL_RANK', 0)) if torch.cuda.is_available() else -1),
        TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        torch.random.fork_rng(range(torch.cuda.device_count())),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter('ignore')  # the run says it again
        MMLogger.get_instance(NAME, log_level='ERROR')
        try:
            yield Path(folder)
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            cudnn.benchmark, cudnn.deterministic = flags
            for kind in _named_kinds():  # some were imported meanwhile
                kind._instance_dict.clear()
                kind._instance_dict.update(named.get(kind, {}))


def _named_kinds() -> list[type]:
    """Classes whose objects mmengine keeps by name: loggers, message hubs, visualizers, scopes."""
    kinds = [ManagerMixin]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return kinds


def check_build(cfg: Config, loops: tuple[str, ...], model: nn.Module, folder: Path, samples: bool = True) -> None:
    """Refuse a config of which a part cannot be built, or cannot work on one sample.

    Within :func:`untouched`.

    Args:
        cfg: The config; all its types are registered.
        loops: Which of ``'train'``, ``'val'``, ``'test'`` will run.
        model: The config's, with its weights; whatever the samples do to it stays.
        folder: For what is written.
        samples: Whether one sample of each loop goes through the model.

    Raises:
        Refusal: Naming the part.
    """
    wanted = set(signature(Runner).parameters) - {'model', 'data_preprocessor', 'work_dir', 'launcher', 'cfg'}
    options = {name: _elsewhere(cfg[name], folder) for name in wanted if cfg.get(name) is not None}
    runner = Rehearsal(model, str(folder), cfg=cfg, **options)
    if 'train' in loops:
        runner.prepare_optimizer()
    for loop in loops:
        if loop != 'train' and runner.has(loop):
            runner.prepare_metrics(loop)
    if cfg.launcher != 'none' and any(_downloads(cfg, loop) for loop in loops):
        return  # every process would
    for loop in loops:
        if runner.has(loop):
            runner.prepare_loop(loop)
    runner.prepare_hooks('train' in loops)
    if not samples:
        return
    for loop in loops:
        if loop == 'train':
            run_training(runner)
        elif runner.has(loop) and (metrics := run_evaluation(runner, loop)) and 'train' in loops:
            check_metrics(runner, metrics)
    if 'train' in loops:
        run_update(runner)


class Rehearsal(Runner):
    """A runner that is built as the run's will be, but logs and begins nothing, and is not distributed."""

    def setup_env(self, env_cfg: dict) -> None:
        """Leave the environment to the run."""
        self._rank, self._world_size, self._timestamp = 0, 1, NAME
        method, known = (env_cfg.get('mp_cfg') or {}).get('mp_start_method', 'fork'), get_all_start_methods()
        with part('env_cfg.mp_cfg'):
            if method not in known:
                raise ValueError(f'mp_start_method must be one of {known}, got {method!r}.')

    def set_randomness(self, seed=None, **options) -> None:
        """As ever, of a seed that is one."""
        with part('randomness'):
            signature(Runner.set_randomness).bind(self, seed, **options)
            if not (seed is None or is_integer(seed) and seed >= 0):
                raise ValueError(f'seed must be a whole number of at least 0, or None, got {seed!r}.')
        super().set_randomness(seed, **options)

    def build_logger(self, log_level: int | str = 'INFO', log_file: str | None = None, **options) -> MMLogger:
        """A logger of errors; the run's level is looked at only."""
        with part('log_level'):
            logging.Handler().setLevel(log_level)
        return MMLogger.get_instance(NAME)

    def build_visualizer(self, visualizer=None):
        """The visualizer, without its backends: some would begin a run on a server."""
        with part('visualizer'):
            found = super().build_visualizer(visualizer)
            for backend in found._vis_backends.values():
                package = PACKAGES.get(type(backend).__name__)
                if package and find_spec(package) is None:
                    raise ImportError(
                        f'vis_backends must be installed, got a {type(backend).__name__} without {package}. '
                        f'`pip install {package}`'
                    )
            found._vis_backends.clear()
        return found

    def build_log_processor(self, log_processor):
        """As ever."""
        with part('log_processor'):
            found = super().build_log_processor(log_processor)
            if not (is_integer(found.window_size) and found.window_size >= 1):
                raise ValueError(f'window_size must be a positive integer, got {found.window_size!r}.')
            return found

    def register_hooks(self, default_hooks: Mapping | None = None, custom_hooks: list | None = None) -> None:
        """Register the config's hooks, one after the other; those of mmengine's own need no check."""
        for name, kind, hooks in (('default_hooks', dict, default_hooks), ('custom_hooks', list | tuple, custom_hooks)):
            if not (hooks is None or isinstance(hooks, kind)):
                raise ValueError(f'{name} must be a {"dict" if kind is dict else "list"} of hooks, got {hooks!r}.')
        for name, hook in (default_hooks or {}).items():
            if hook is not None:
                with part(f'default_hooks.{name}'):
                    before = list(self.hooks)
                    self.register_hook(hook)
                    _check_hooks([hook for hook in self.hooks if hook not in before])
        for i, hook in enumerate(custom_hooks or []):
            with part(f'custom_hooks[{i}]'):
                before = list(self.hooks)
                self.register_hook(hook)
                _check_hooks([hook for hook in self.hooks if hook not in before])

    def _log_env(self, env_cfg: dict) -> None:
        """Log nothing."""

    def dump_config(self) -> None:
        """Write nothing."""

    def has(self, loop: str) -> bool:
        """Whether the config has what a loop needs; validation may be left out."""
        return loop == 'train' or self.cfg.get(f'{loop}_dataloader') is not None

    def prepare_optimizer(self) -> None:
        """Build what steps; it needs no data."""
        with part('optim_wrapper'):
            check_paramwise(self.optim_wrapper, own_keys(self.cfg))
            self.optim_wrapper = self.build_optim_wrapper(self.optim_wrapper)
            _check_rates(self.optim_wrapper)
        with part('auto_scale_lr'):
            self.scale_lr(self.optim_wrapper, self.auto_scale_lr)

    def prepare_metrics(self, loop: str) -> None:
        """Build what judges a loop's predictions; it needs no data."""
        name = f'_{loop}_evaluator'
        with part(name[1:]):
            setattr(self, name, self.build_evaluator(getattr(self, name)))
            for metric in getattr(self, name).metrics:
                _check_topk(getattr(metric, 'topk', ()))

    def prepare_loop(self, loop: str) -> None:
        """Build the data, the loop, and what needs both."""
        name, options = f'{loop}_cfg', self.cfg[f'{loop}_cfg']
        loader = self._build_loader(f'{loop}_dataloader')
        setattr(self, f'_{loop}_dataloader', loader)
        if loop == 'train':
            check_lengths(options)
        with part(name):
            built = getattr(self, f'build_{loop}_loop')(getattr(self, f'_{loop}_loop'))
        setattr(self, f'_{loop}_loop', built)
        if isinstance(built, EpochBasedTrainLoop | ValLoop | TestLoop):
            check_ends(loader, f'{loop}_dataloader', type(built).__name__)
        if loop == 'train' and self.param_schedulers is not None:
            with part('param_scheduler'):
                _check_begin(self.param_schedulers)
                if not isinstance(self.optim_wrapper, OptimWrapper | OptimWrapperDict):  # DeepSpeed's, for its strategy
                    self.optim_wrapper = OptimWrapper(self.optim_wrapper.optimizer)
                self.param_schedulers = self.build_param_scheduler(self.param_schedulers)

    def prepare_hooks(self, train: bool) -> None:
        """Let those hooks look at the runner that are known to do no more, before it starts."""
        for hook in self.hooks:
            if isinstance(hook, EMAHook) or type(hook).__module__.startswith('mmdyt.'):
                with part(f'custom_hooks, {type(hook).__name__},', 'fit the config'):
                    hook.before_run(self)
                    if train:
                        hook.before_train(self)

    def _build_loader(self, name: str) -> DataLoader:
        """A loader as it is asked for, that reads in this process."""
        with part(name):
            random_ranks = self._randomness_cfg.get('diff_rank_seed', False)
            loader = self.build_dataloader(self.cfg[name], seed=self.seed, diff_rank_seed=random_ranks)
            check_not_empty(loader, name)
        loader.num_workers = loader.timeout = 0
        return loader


def _elsewhere(node, folder: Path):
    """A copy of a part of the config whose files and folders to write lie in ``folder``."""
    if isinstance(node, dict):
        copied = type(node)({key: _elsewhere(value, folder) for key, value in node.items()})
        for key, value in copied.items():
            if isinstance(value, str) and WRITTEN.fullmatch(key):
                copied[key] = str(folder / Path(value).name)
        return copied
    if isinstance(node, list | tuple):
        return type(node)(_elsewhere(value, folder) for value in node)
    return copy.deepcopy(node)


def _downloads(cfg: Config, loop: str) -> bool:
    """Whether a data set of a loop reads an address or downloads itself."""
    dataset = (cfg.get(f'{loop}_dataloader') or {}).get('dataset')
    return any(fetches_itself(part) for _, part in nested(dataset, loop))


def _check_rates(wrapper) -> None:
    """Refuse a learning rate below zero, which factors of ``paramwise_cfg`` can make of a good one."""
    for rates in wrapper.get_lr().values() if isinstance(wrapper.get_lr(), dict) else [wrapper.get_lr()]:
        if min(rates if isinstance(rates, list | tuple) else [rates], default=0) < 0:
            raise ValueError(f'lr and its factors (lr_mult) must not be negative, got a learning rate of {min(rates)}.')


def _check_topk(topk) -> None:
    """Refuse an accuracy among the best 0: nothing is right."""
    for k in topk if isinstance(topk, list | tuple) else [topk]:
        if isinstance(k, int) and k < 1:
            raise ValueError(f'topk must hold positive integers, got {k}.')


def _check_begin(schedulers) -> None:
    """Refuse a schedule that begins before training."""
    for one in schedulers if isinstance(schedulers, list | tuple) else [schedulers]:
        begin = one.get('begin', 0) if isinstance(one, Mapping) else 0
        if not (is_number(begin) and begin >= 0):
            raise ValueError(f'begin must be a number of at least 0, got {begin!r}.')
        if isinstance(one, Mapping) and one.get('start_factor') == 0:
            raise ValueError('start_factor must be above 0, got 0: what begins at 0 stays there.')


def _check_hooks(hooks: list) -> None:
    """Refuse what the constructor of a host's hook takes and its work does not."""
    for hook in [hook for hook in hooks if type(hook).__module__.partition('.')[0] in HOSTS]:
        interval = getattr(hook, 'interval', 1)
        if isinstance(interval, str):
            raise ValueError(f'interval must be a number, got {interval!r}.')
        if interval == 0:
            raise ValueError('interval must not be 0, got 0: the hook would never be due. With -1 it says so.')
        if isinstance(hook, CheckpointHook) and hook.args:
            # it hands them to ``Runner.save_checkpoint``, which takes nothing besides what the hook itself says
            known = list(signature(type(hook)).parameters)
            wrong = next(iter(hook.args))
            raise ValueError(f'its arguments must be among {known[:-1]}, got {wrong!r}.{near(wrong, known)}')
