"""Check what the user typed before any work starts: files, data, registered names, checkpoints."""

import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import find_latest_checkpoint
from mmengine.utils import import_modules_from_strings

from mmdyt.engine.checkpoints import check_exists, check_fit, check_resumable, pretrained_cfgs, read_tensors
from mmdyt.engine.names import check_types, near

LOOPS = ('train', 'val', 'test')


@contextmanager
def clean_exit() -> Iterator[None]:
    """Turn an error about user input into one message and exit code 2, without a traceback."""
    try:
        yield
    except (ValueError, TypeError, KeyError, OSError, AssertionError, ImportError) as error:
        if os.environ.get('MMDYT_TRACEBACK'):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        if os.environ.get('RANK', '0') == '0':
            print(f'error: {message}', file=sys.stderr)
        sys.exit(2)


def load_config(args: Namespace) -> Config:
    """Read the config file and merge the command line into it.

    Args:
        args: With ``config``, ``cfg_options``, ``work_dir``, ``launcher``, ``local_rank``.

    Raises:
        FileNotFoundError: If the config is missing.
    """
    path = Path(args.config)
    if not path.is_file():
        known = [str(p) for p in Path('configs').rglob('*.py')]
        raise FileNotFoundError(f'config must name an existing file, got {args.config}.{near(args.config, known)}')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = Config.fromfile(path, import_custom_modules=False)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs') / path.stem)
    return cfg


def use_amp(cfg: Config) -> None:
    """Switch the optimizer wrapper to mixed precision: fp16 with loss scale on a GPU, bf16 on the CPU.

    Raises:
        ValueError: For an optimizer wrapper that cannot.
    """
    kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise ValueError(f"--amp must find optim_wrapper.type 'OptimWrapper', got {kind!r}.")
    if torch.cuda.is_available():
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    else:
        cfg.optim_wrapper.type = 'mmdyt.CPUAmpOptimWrapper'


def set_resume(cfg: Config, resume: str | None) -> None:
    """Resume from a checkpoint, or with ``'auto'`` from the latest in the work dir; none there starts afresh."""
    if resume is None:
        return
    cfg.resume = True
    cfg.load_from = find_latest_checkpoint(cfg.work_dir) if resume == 'auto' else resume


def use_tta(cfg: Config) -> None:
    """Test through the config's test-time augmentation.

    Raises:
        ValueError: If the config has none.
    """
    for name in ('tta_model', 'tta_pipeline'):
        if not cfg.get(name):
            raise ValueError(f'--tta must find {name} in the config, got none.')
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.model = cfg.tta_model | dict(module=cfg.model)


def paint_predictions(cfg: Config, folder: str) -> None:
    """Let the config's visualization hook write the prediction of every image into ``folder``.

    Raises:
        ValueError: If the config has no such hook.
    """
    hook = cfg.get('default_hooks', {}).get('visualization')
    if not hook or not cfg.get('visualizer'):
        raise ValueError('--show-dir must find a visualizer and a visualization hook in the config, got none.')
    # mmseg's hook has a name and a switch of its own
    switch = dict(draw=True) if 'Seg' in hook.type else dict(enable=True, out_dir=folder)
    hook.update(interval=1, **switch)
    cfg.visualizer.save_dir = folder


def check(cfg: Config, loops: tuple[str, ...]) -> None:
    """Refuse a config that cannot run, before anything is written.

    Args:
        cfg: The config, merged with the command line.
        loops: Which of ``'train'``, ``'val'``, ``'test'`` will run.

    Raises:
        FileNotFoundError: If a checkpoint, data root, data folder or annotation file is missing.
        KeyError: If a registered type is unknown.
        ValueError: If a constructor refuses its arguments, or a checkpoint does not fit.
    """
    if cfg.get('load_from'):
        check_exists('checkpoint', cfg.load_from)
    for loop in loops:
        loader = cfg.get(f'{loop}_dataloader')
        if loader:
            check_data(loader.get('dataset'), f'{loop}_dataloader.dataset')
    import_modules_from_strings(**cfg.get('custom_imports', dict(imports=[])))
    scope = cfg.get('default_scope', 'mmengine')
    init_default_scope(scope)
    unused = {f'{loop}_{part}' for loop in LOOPS if loop not in loops for part in ('dataloader', 'evaluator', 'cfg')}
    check_types({key: value for key, value in cfg.items() if key not in unused}, scope)
    pretrained = list(pretrained_cfgs(cfg.model, 'model'))
    for where, init_cfg in pretrained:
        check_exists(f'{where}.checkpoint', init_cfg['checkpoint'])
    model = MODELS.build(cfg.model)
    if cfg.get('load_from'):
        resume = 'train' in loops and cfg.get('resume', False)
        if resume:
            check_resumable(cfg.load_from)
        exact = 'train' not in loops or resume
        check_fit(model, read_tensors(cfg.load_from), cfg.load_from, exact=exact)
    elif 'train' in loops:
        for where, init_cfg in pretrained:
            module = model.get_submodule(where.removeprefix('model').removesuffix('init_cfg').strip('.'))
            path, prefix = init_cfg['checkpoint'], init_cfg.get('prefix', '')
            check_fit(module, read_tensors(path, prefix), path, exact=False)
    if cfg.launcher != 'none' and not torch.cuda.is_available():
        _use_cpu_processes(cfg)


def check_data(dataset: ConfigDict | None, where: str) -> None:
    """Refuse a data set config whose root, folders or annotation file do not exist.

    Looks into wrappers (``dataset``, ``datasets``). Data sets that download themselves are left alone.
    """
    if not dataset:
        return
    for name in ('dataset', 'datasets'):
        inner = dataset.get(name)
        for i, part in enumerate(inner if isinstance(inner, list) else [inner]):
            check_data(part, f'{where}.{name}' + (f'[{i}]' if isinstance(inner, list) else ''))
    root = dataset.get('data_root') or ''
    if root and not Path(root).expanduser().is_dir():
        raise FileNotFoundError(
            f'{where}.data_root must name an existing folder, got {root}. '
            f'Put the data there, or set it: --cfg-options {where}.data_root=FOLDER'
        )
    prefixes = dataset.get('data_prefix') or {}
    for name, prefix in prefixes.items() if isinstance(prefixes, dict) else [('', prefixes)]:
        if prefix and not (Path(root) / prefix).expanduser().is_dir():
            name = f'data_prefix.{name}'.rstrip('.')
            raise FileNotFoundError(f'{where}.{name} must name an existing folder, got {Path(root) / prefix}.')
    annotations = dataset.get('ann_file')
    if annotations and not (Path(root) / annotations).expanduser().is_file():
        raise FileNotFoundError(f'{where}.ann_file must name an existing file, got {Path(root) / annotations}.')


def _use_cpu_processes(cfg: Config) -> None:
    """Prepare a distributed run without GPUs: mmengine's own set-up insists on CUDA devices."""
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    torch.distributed.init_process_group(backend='gloo')
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
