"""Check what the user typed before any work starts: files, data, registered names, checkpoints."""

import copy
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.model import BaseTTAModel
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import import_modules_from_strings

from .build import check_build, untouched
from .checkpoints import (
    AUXILIARY,
    TunedTensors,
    check_exists,
    check_fit,
    check_resumable,
    pretrained_cfgs,
    read_tensors,
)
from .datasets import check_data, head_classes
from .keys import KNOWN, check_arguments, check_keys, own_keys
from .labels import check_labels
from .names import check_types, name_of
from .processes import check_runner, is_flexible, keep_wrapper, use_cpu_processes
from .refusals import part
from .work_dir import check_folder

LOOPS = ('train', 'val', 'test')
PARTS = ('dataloader', 'cfg', 'evaluator')


def check(cfg: Config, loops: tuple[str, ...], *, dry_run: bool = True) -> None:
    """Refuse a config that cannot run, before anything is written.

    Whatever can be built is built, and thrown away.

    Args:
        cfg: The config, merged with the command line.
        loops: Which of ``'train'``, ``'val'``, ``'test'`` will run.
        dry_run: Whether one sample of each loop goes through the model, too.

    Raises:
        FileNotFoundError: If a checkpoint, data root, data folder or annotation file is missing.
        KeyError: If a registered type is unknown.
        ValueError: If a constructor refuses its arguments, a checkpoint does not fit, a list of samples is wrong, or
            a part of the config does not work.
    """
    check_keys(cfg)
    _check_complete(cfg, loops)
    train, resume = 'train' in loops, 'train' in loops and cfg.get('resume', False)
    if loops and cfg.get('work_dir'):
        check_folder('--work-dir', cfg.work_dir)
    if cfg.get('load_from'):
        check_exists('checkpoint', cfg.load_from)
    with part('custom_imports', 'be imported'):
        import_modules_from_strings(**cfg.get('custom_imports', dict(imports=[])))
    scope = cfg.get('default_scope', 'mmengine')
    with suppress(ImportError):
        import_module(f'{scope}.registry')  # where nothing has imported the host yet
    if scope not in (known := ['mmengine', *MODELS.children]):
        raise ValueError(f'default_scope must be one of {known}, got {scope!r}.')
    init_default_scope(scope)
    check_runner(cfg)
    keep_wrapper(cfg)
    unused = {f'{loop}_{part}' for loop in LOOPS if loop not in loops for part in PARTS}
    used = {key: value for key, value in cfg.items() if key in KNOWN and key not in unused}
    # heads and backbones have types of their own in a model: whether all are known, only building it tells
    check_types({key: value for key, value in used.items() if key not in ('model', 'tta_model')}, scope)
    check_arguments(used, scope, own=own_keys(cfg))
    with untouched():
        check_labels(cfg, loops)
    pretrained = list(pretrained_cfgs(cfg.model, 'model')) if train else []
    for where, init_cfg in pretrained:
        check_exists(f'{where}.checkpoint', init_cfg.get('checkpoint'))
    if resume:
        check_resumable(cfg.load_from, cfg)
    check_lora(cfg.model)
    with untouched() as folder:
        model = _build_model(cfg)
        host = model.module if isinstance(model, BaseTTAModel) else model
        if cfg.get('load_from'):
            spare = dict(spare=AUXILIARY) if not train else {}
            tensors = read_tensors(cfg.load_from)
            if isinstance(tensors, TunedTensors) and is_flexible(cfg):
                raise ValueError(
                    f'checkpoint must be whole with {cfg.runner_type}, got {cfg.load_from}, which holds what was tuned '
                    'alone. `python tools/tuned.py apply` makes a whole one.'
                )
            check_fit(host, tensors, cfg.load_from, exact=resume or not train, **spare)
        else:
            for where, init_cfg in pretrained:
                _check_pretrained(cfg, model, where, init_cfg)
        if loops:
            check_build(cfg, loops, model, folder, dry_run)
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


def check_lora(node, where: str = 'model') -> None:
    """Refuse mmpretrain's LoRAModel around anything of this package: it would freeze adapters and dispatchers.

    Raises:
        ValueError: Naming the place.
    """
    if isinstance(node, dict):
        if name_of(node.get('type')).rpartition('.')[2] == 'LoRAModel' and (kind := _own_type(node.get('module'))):
            raise ValueError(
                f'{where}.module must be no model of mmdyt within a LoRAModel, which would freeze its parts, got '
                f"{kind}. Use --method lora, or parts=[dict(type='mmdyt.LoRA')] of the backbone."
            )
        for key, value in node.items():
            check_lora(value, f'{where}.{key}')


def _own_type(node) -> str | None:
    """The first type of this package in a part of a config."""
    if isinstance(node, list | tuple):
        return next((kind for value in node if (kind := _own_type(value))), None)
    if not isinstance(node, dict):
        return None
    kind = node.get('type')
    name = kind if isinstance(kind, str) else f'{getattr(kind, "__module__", "")}.{name_of(kind)}'
    return name if name.startswith('mmdyt.') else _own_type(list(node.values()))


def _build_model(cfg: Config) -> nn.Module:
    """The config's model, as a runner builds it."""
    model = copy.deepcopy(cfg.model)
    if cfg.get('data_preprocessor') is not None:
        model.setdefault('data_preprocessor', copy.deepcopy(cfg.data_preprocessor))
    with part('model', named=False):
        try:
            return MODELS.build(model)
        except Exception:
            check_types(dict(model=cfg.model), cfg.get('default_scope', 'mmengine'))  # says where, and what was meant
            raise


def _check_pretrained(cfg: Config, model: nn.Module, where: str, init_cfg: dict) -> None:
    """Refuse a pre-trained base that does not fit its module."""
    place = where.removeprefix('model').removesuffix('init_cfg').strip('.')
    module, node = model.get_submodule(place), cfg.model
    for name in place.split('.') if place else []:
        if name_of(node.get('type')).rpartition('.')[2] == 'LoRAModel':  # has loaded it, then renamed its tensors
            module = MODELS.build(copy.deepcopy(node.module))
            break
        node = node[name]
    path, prefix = init_cfg['checkpoint'], init_cfg.get('prefix', '')
    check_fit(module, read_tensors(path, prefix), path, exact=False)


def _check_complete(cfg: Config, loops: tuple[str, ...]) -> None:
    """Refuse a config without a model, or without what a loop that must run needs."""
    if 'train' in loops and cfg.get('activation_checkpointing'):
        raise ValueError(
            f'activation_checkpointing must not be set, got {cfg.activation_checkpointing}. It drops the gradients of '
            'adapters and dispatchers in a frozen base, without a word. Take model.backbone.with_cp=True.'
        )
    needed = ['model']
    for loop in LOOPS:
        parts = [f'{loop}_{part}' for part in PARTS] if loop != 'train' else ['train_dataloader', 'train_cfg']
        parts += ['optim_wrapper'] * (loop == 'train')
        present = [name for name in parts if cfg.get(name) is not None]
        needed += parts if present or loop in {*loops} - {'val'} else []
    for name in needed:
        if cfg.get(name) is None:
            raise ValueError(f'config must set {name}, got none.')
