"""Check what the user typed before any work starts: files, data, registered names, checkpoints."""

import atexit
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import find_latest_checkpoint
from mmengine.utils import import_modules_from_strings

from mmdyt.engine.checkpoints import check_exists, check_fit, check_resumable, pretrained_cfgs, read_tensors
from mmdyt.engine.datasets import check_data, head_classes
from mmdyt.engine.names import check_types, near

LOOPS = ('train', 'val', 'test')
PARTS = ('dataloader', 'cfg', 'evaluator')


@contextmanager
def clean_exit() -> Iterator[None]:
    """Turn an error about user input into one message and exit code 2; ``MMDYT_TRACEBACK=1`` shows where it arose."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError,
            SyntaxError, TypeError, ValueError) as error:  # fmt: skip
        if os.environ.get('MMDYT_TRACEBACK'):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        if os.environ.get('LOCAL_RANK', '0') == '0':  # once per machine: files may be missing on one only
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
    """Resume from a checkpoint, or with ``'auto'`` from the latest in the work dir; none there starts as without."""
    checkpoint = find_latest_checkpoint(cfg.work_dir) if resume == 'auto' else resume
    if checkpoint is not None:
        cfg.resume, cfg.load_from = True, checkpoint


def use_tta(cfg: Config) -> None:
    """Test through the config's test-time augmentation.

    Raises:
        ValueError: If the config has none.
    """
    for name in ('tta_model', 'tta_pipeline'):
        if not cfg.get(name):
            raise ValueError(f'--tta must find {name} in the config, got none.')
    if 'pipeline' not in cfg.test_dataloader.dataset:
        kind = cfg.test_dataloader.dataset.type
        raise ValueError(f'--tta must find a data set with a pipeline in test_dataloader, got the wrapper {kind}.')
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


def dump_predictions(cfg: Config, file: str) -> None:
    """Let the test write all its predictions into a pickle.

    Raises:
        ValueError: If the file's name does not end with ``.pkl`` or ``.pickle``, or its folder is missing.
    """
    if not file.endswith(('.pkl', '.pickle')) or not Path(file).resolve().parent.is_dir():
        raise ValueError(f'--dump must name a .pkl file in an existing folder, got {file}.')
    evaluator = cfg.get('test_evaluator') or []
    metrics = list(evaluator) if isinstance(evaluator, list | tuple) else [evaluator]
    cfg.test_evaluator = [*metrics, dict(type='DumpResults', out_file_path=file)]


def check(cfg: Config, loops: tuple[str, ...]) -> None:
    """Refuse a config that cannot run, before anything is written.

    Args:
        cfg: The config, merged with the command line.
        loops: Which of ``'train'``, ``'val'``, ``'test'`` will run.

    Raises:
        FileNotFoundError: If a checkpoint, data root, data folder or annotation file is missing.
        KeyError: If a registered type is unknown.
        ValueError: If a constructor refuses its arguments, a checkpoint does not fit, or a list of samples is wrong.
    """
    _check_complete(cfg, loops)
    train, resume = 'train' in loops, 'train' in loops and cfg.get('resume', False)
    if cfg.get('load_from'):
        check_exists('checkpoint', cfg.load_from)
    import_modules_from_strings(**cfg.get('custom_imports', dict(imports=[])))
    scope = cfg.get('default_scope', 'mmengine')
    init_default_scope(scope)
    unused = {f'{loop}_{part}' for loop in LOOPS if loop not in loops for part in PARTS}
    check_types({key: value for key, value in cfg.items() if key not in unused}, scope)
    num_classes = head_classes(cfg.model)
    for loop in loops:
        check_data((cfg.get(f'{loop}_dataloader') or {}).get('dataset'), f'{loop}_dataloader.dataset', num_classes)
    pretrained = list(pretrained_cfgs(cfg.model, 'model')) if train else []
    for where, init_cfg in pretrained:
        check_exists(f'{where}.checkpoint', init_cfg.get('checkpoint'))
    if resume:
        check_resumable(cfg.load_from)
    model = MODELS.build(cfg.model)
    if cfg.get('load_from'):
        check_fit(model, read_tensors(cfg.load_from), cfg.load_from, exact=resume or not train)
    else:
        for where, init_cfg in pretrained:
            module = model.get_submodule(where.removeprefix('model').removesuffix('init_cfg').strip('.'))
            path, prefix = init_cfg['checkpoint'], init_cfg.get('prefix', '')
            check_fit(module, read_tensors(path, prefix), path, exact=False)
    if cfg.launcher != 'none' and not torch.cuda.is_available():
        _use_cpu_processes(cfg)


def check_images(cfg: Config, loaders: Sequence[str]) -> None:
    """Refuse data loaders that a calibration reads, besides what :func:`check` looked at.

    Args:
        cfg: The config; its modules are imported.
        loaders: Names of data loaders; the first must be there.

    Raises:
        FileNotFoundError: If a data root, folder or annotation file is missing.
        KeyError: If a registered type is unknown.
        ValueError: If the first loader is missing, or a list of samples is wrong.
    """
    if cfg.get(loaders[0]) is None:
        raise ValueError(f'config must set {loaders[0]}, got none.')
    for name in loaders:
        if cfg.get(name) is not None:
            check_types({name: cfg[name]}, cfg.get('default_scope', 'mmengine'))
            check_data(cfg[name].dataset, f'{name}.dataset', head_classes(cfg.model))


def _check_complete(cfg: Config, loops: tuple[str, ...]) -> None:
    """Refuse a config without a model, or without what a loop that must run needs."""
    if 'train' in loops and cfg.get('activation_checkpointing'):
        raise ValueError(
            f'activation_checkpointing must not be set, got {cfg.activation_checkpointing}. It drops the gradients of '
            'adapters and dispatchers in a frozen base, without a word.'
        )
    needed = ['model'] + ['optim_wrapper'] * ('train' in loops)
    for loop in loops:
        parts = [f'{loop}_{part}' for part in PARTS if (loop, part) != ('train', 'evaluator')]
        present = [name for name in parts if cfg.get(name) is not None]
        needed += parts if present or loop != 'val' else []
    for name in needed:
        if cfg.get(name) is None:
            raise ValueError(f'config must set {name}, got none.')


def _use_cpu_processes(cfg: Config) -> None:
    """Prepare a distributed run without GPUs: mmengine's own set-up and SyncBN insist on CUDA devices."""
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    torch.distributed.init_process_group(backend='gloo')
    # gloo's threads abort the process if they are still there when the interpreter ends
    atexit.register(torch.distributed.destroy_process_group)
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
    if _replace_type(cfg.model, 'SyncBN', 'BN'):
        print_log('No GPU: SyncBN became BN, so each process normalises its own images.', level=logging.WARNING)


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
