"""A resumed run ends in the tensors of the unbroken one: every kind of loop, workers and place to stop."""

import gc
from pathlib import Path

import pytest
import torch
from conftest import forget_runs
from mmengine.config import Config
from mmengine.runner import Runner

# draws from NumPy's generator and from torch's
PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=16),
    dict(type='NumpyToPIL'),
    dict(type='torchvision/RandomHorizontalFlip'),
    dict(type='PILToNumpy'),
    dict(type='Resize', scale=(32, 32), backend='pillow'),
    dict(type='PackInputs'),
]
EPOCHS = dict(by_epoch=True, max_epochs=3, val_interval=2)  # of 3 iterations
ITERATIONS = dict(type='IterBasedTrainLoop', max_iters=9, val_interval=4)
MIX = dict(augments=[dict(type='Mixup', alpha=0.8)])  # draws from NumPy's generator in the training process
NO_HOOKS: tuple = ()
TAU = (dict(type='mmdyt.TauScheduleHook', start=5.0, end=0.1),)
EVIDENCE = (dict(type='mmdyt.EvidenceHook', begin=0.4, end=0.8, num_batches=1, feature_weight=1.0),)
KINDS = {  # loop, workers, persistent, hooks, where it is broken off
    'epochs, no workers': (EPOCHS, 0, False, NO_HOOKS, ('iter_3', 'iter_6')),  # written again after validation
    'epochs, a worker for each': (EPOCHS, 1, False, NO_HOOKS, ('epoch_2',)),
    'epochs, a worker for all': (EPOCHS, 1, True, TAU, ('epoch_2',)),
    'epochs, two workers for all': (EPOCHS, 2, True, NO_HOOKS, ('iter_4',)),
    'epochs, evidence': (EPOCHS, 1, True, EVIDENCE, ('iter_5',)),
    'iterations, no workers': (ITERATIONS, 0, False, NO_HOOKS, ('iter_4',)),
    'iterations, two workers for all': (ITERATIONS, 2, True, TAU, ('iter_4',)),
    'iterations, evidence': (ITERATIONS, 0, False, EVIDENCE, ('iter_5',)),
}


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    """For pretty configs, nor for the workers of a loader that is left in the middle of its data, 5 s each."""
    monkeypatch.setattr('mmengine.config.config.FormatCode', lambda text, **options: (text, True))
    monkeypatch.setattr('torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL', 0.1)
    yield
    gc.collect()


@pytest.fixture
def config(tiny_cls_config):
    def build(kind: str, work_dir: Path) -> Config:
        loop, workers, persistent, hooks, _ = KINDS[kind]
        cfg = Config.fromfile(tiny_cls_config)
        loader = dict(num_workers=workers, persistent_workers=persistent)
        cfg.train_dataloader.update(loader)
        cfg.val_dataloader.update(loader)
        for part in ('train_dataloader', 'val_dataloader'):
            cfg[part].dataset.pipeline = PIPELINE
        if loop is ITERATIONS:
            cfg.train_dataloader.sampler.type = 'InfiniteSampler'
            cfg.log_processor = dict(by_epoch=False)
        if hooks is EVIDENCE:
            cfg.model.update(rate_weight=0.0, complete_weight=0.0, distill_weight=0.0)
            cfg.model.backbone.dispatcher = dict(type='mmdyt.TokenDispatcher', noise=False, fitted=True)
        elif not workers:
            cfg.model.train_cfg = MIX
            cfg.model.data_preprocessor.num_classes = 3
        cfg.train_cfg = loop
        cfg.default_hooks.checkpoint = dict(
            type='CheckpointHook', by_epoch=False, interval=1, save_best='accuracy/top1', rule='greater'
        )
        cfg.custom_hooks = [dict(type='mmdyt.RNGStateHook'), dict(type='CheckpointHook', interval=1), *hooks]
        cfg.update(work_dir=str(work_dir), launcher='none', log_level='ERROR')
        return cfg

    return build


def train(cfg: Config, checkpoint: Path | None = None) -> dict:
    """Train to the end; return what the last checkpoint holds."""
    forget_runs()
    if checkpoint is not None:
        cfg.update(resume=True, load_from=str(checkpoint))
    Runner.from_cfg(cfg).train()
    return torch.load(Path(cfg.work_dir) / 'iter_9.pth')


@pytest.mark.parametrize('kind', KINDS)
def test_resumed_is_unbroken(kind, config, tmp_path):
    unbroken = train(config(kind, tmp_path / 'unbroken'))
    for place in KINDS[kind][-1]:
        resumed = train(config(kind, tmp_path / place), tmp_path / 'unbroken' / f'{place}.pth')
        tensors = resumed['state_dict']
        differing = [name for name, tensor in unbroken['state_dict'].items() if not torch.equal(tensor, tensors[name])]
        assert (place, differing) == (place, [])
        assert resumed['meta']['iter'] == 9
        assert torch.equal(resumed['rng_state']['torch'], unbroken['rng_state']['torch'])
