"""A checkpoint, made ready to predict."""

import copy
from argparse import Namespace
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmdyt import preflight
from mmdyt.engine.host import find_host, is_recognizer
from mmdyt.preflight.carried import carried_config
from mmdyt.preflight.checkpoints import (
    AUXILIARY,
    check_exists,
    check_fit,
    pretrained_cfgs,
    read_checkpoint,
    tensors_in,
)
from mmdyt.preflight.label_names import class_names
from mmdyt.preflight.names import check_types

from .predictor import Predictor
from .reading import Reader

LOADERS = ('test_dataloader', 'val_dataloader')  # whose pipeline is used: the first that is there


def load(
    checkpoint: str | Path, config: str | Path | Config | None = None, device: str | torch.device = 'cpu'
) -> Predictor:
    """Load a model that was trained with this package, to predict images or clips.

    Args:
        checkpoint: Its file; of a tuned-only one the base is found by the ``init_cfg`` of the config.
        config: Its config, or the file of it. None reads the one that the checkpoint carries, as values and without
            running any of it (:func:`mmdyt.preflight.carried.carried_config`).
        device: To predict on.

    Raises:
        FileNotFoundError: If a file is missing.
        KeyError: If a registered type is unknown.
        TypeError: If the model's backbone is none of mmdyt's.
        ValueError: If the checkpoint does not load safely, does not fit the model, or carries no config; or if the
            config has no test pipeline.
    """
    path = str(checkpoint)
    check_exists('checkpoint', path)
    content = read_checkpoint(path)
    cfg = carried_config(content, path) if config is None else _read(config)
    if config is None and 'tuned' in content:
        check_local_base(cfg, path)
    scope = cfg.get('default_scope', 'mmengine')
    with DefaultScope.overwrite_default_scope(scope):
        only = {key: cfg[key] for key in ('model', 'default_scope', 'custom_imports') if cfg.get(key) is not None}
        preflight.check(Config(dict(only, launcher='none')), loops=())
        dataset = test_dataset(cfg)
        check_types(dict(pipeline=dataset['pipeline']), scope)
        host = find_host(MODELS.build(cfg.model))
        check_fit(host, tensors_in(content, path), path, exact=True, spare=AUXILIARY)  # loads it
        with preflight.part('test_dataloader.dataset.pipeline'):
            reader = Reader(dataset['pipeline'], is_recognizer(host))
        meta = _about(content, dataset)
    return Predictor(host, reader, meta.get('classes') or (), meta.get('palette') or ()).to(device)


def check_local_base(cfg: Config, path: str) -> None:
    """Refuse to fetch a base that a carried config names: the file may come from anybody.

    Args:
        cfg: From :func:`mmdyt.preflight.carried.carried_config`.
        path: Of the file that carries it.

    Raises:
        FileNotFoundError: If the base is missing.
        ValueError: If it lies at an address.
    """
    for where, init_cfg in pretrained_cfgs(cfg.model, 'model'):
        base = init_cfg.get('checkpoint')
        check_exists(f'{where}.checkpoint', base)
        if '://' in base:
            raise ValueError(
                f'{where}.checkpoint must be a local file in a config that a checkpoint carries, got {base} in {path}. '
                'Name the config file.'
            )


def _read(config: str | Path | Config) -> Config:
    """The config that the user named."""
    if not isinstance(config, Config):
        args = dict(config=str(config), cfg_options=None, work_dir=None, launcher='none', local_rank=0)
        return preflight.load_config(Namespace(**args))
    cfg = copy.deepcopy(config)
    if isinstance(cfg.get('model'), dict) and cfg.get('data_preprocessor') is not None:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return cfg


def test_dataset(cfg: Config) -> dict:
    """The data set of a test, or else of validation, out of its wrappers.

    Raises:
        ValueError: If there is none with a pipeline.
    """
    loader = next((cfg[name] for name in LOADERS if cfg.get(name)), None) or {}
    dataset = loader.get('dataset') or {}
    while not dataset.get('pipeline'):
        inner = dataset.get('dataset') or next(iter(dataset.get('datasets') or ()), None)
        if inner is None:
            raise ValueError('config must have a test_dataloader, whose pipeline is used, got none.')
        dataset = inner
    return dataset


def _about(content: dict, dataset: dict) -> dict:
    """Names and colours of the classes: those that the model was trained with, else those of the config."""
    known = (content.get('meta') or {}).get('dataset_meta') or {}
    known = {key.lower(): value for key, value in known.items()}
    given = dict(dataset.get('metainfo') or {})
    if known.get('classes') is None or isinstance(known['classes'], str):
        known['classes'] = class_names(dataset, 'dataset') if dataset.get('type') else given.get('classes')
    if known.get('palette') is None:
        known['palette'] = given.get('palette')
    return {
        'classes': tuple(map(str, known['classes'])) if isinstance(known['classes'], list | tuple) else (),
        'palette': list(known['palette']) if isinstance(known['palette'], list | tuple) else [],
    }
