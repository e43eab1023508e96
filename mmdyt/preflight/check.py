"""Check what the user typed before any work starts: files, data, registered names, checkpoints."""

from collections.abc import Sequence

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import import_modules_from_strings

from .checkpoints import check_exists, check_fit, check_resumable, pretrained_cfgs, read_tensors
from .datasets import check_data, head_classes
from .labels import check_labels
from .names import check_types
from .processes import check_runner, keep_wrapper, use_cpu_processes
from .work_dir import check_folder

LOOPS = ('train', 'val', 'test')
PARTS = ('dataloader', 'cfg', 'evaluator')


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
    if loops and cfg.get('work_dir'):
        check_folder('--work-dir', cfg.work_dir)
    if cfg.get('load_from'):
        check_exists('checkpoint', cfg.load_from)
    import_modules_from_strings(**cfg.get('custom_imports', dict(imports=[])))
    scope = cfg.get('default_scope', 'mmengine')
    init_default_scope(scope)
    check_runner(cfg)
    keep_wrapper(cfg)
    unused = {f'{loop}_{part}' for loop in LOOPS if loop not in loops for part in PARTS}
    check_types({key: value for key, value in cfg.items() if key not in unused}, scope)
    check_labels(cfg, loops)
    pretrained = list(pretrained_cfgs(cfg.model, 'model')) if train else []
    for where, init_cfg in pretrained:
        check_exists(f'{where}.checkpoint', init_cfg.get('checkpoint'))
    if resume:
        check_resumable(cfg.load_from, cfg)
    model = MODELS.build(cfg.model)
    if cfg.get('load_from'):
        check_fit(model, read_tensors(cfg.load_from), cfg.load_from, exact=resume or not train)
    else:
        for where, init_cfg in pretrained:
            module = model.get_submodule(where.removeprefix('model').removesuffix('init_cfg').strip('.'))
            path, prefix = init_cfg['checkpoint'], init_cfg.get('prefix', '')
            check_fit(module, read_tensors(path, prefix), path, exact=False)
    if cfg.launcher != 'none' and not torch.cuda.is_available():
        use_cpu_processes(cfg)


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
