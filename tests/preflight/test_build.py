"""Whatever a run builds is built before it starts; what cannot be, or does not work on a sample, is refused by name."""

import random
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger

from mmdyt import preflight
from mmdyt.preflight.refusals import HINT

FORM = r'error: .*\S+ must .+, got .+'


def config(path: Path, **options) -> Config:
    """The config with options as of the command line."""
    args = Namespace(config=path, cfg_options=options, work_dir='nowhere', launcher='none', local_rank=0)
    return preflight.load_config(args)


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """``refused(config, loops, option=value...)`` returns the message with which a tool would end."""
    monkeypatch.chdir(tmp_path)

    def refuse(path: Path, loops: tuple[str, ...] = ('train', 'val'), *, dry_run: bool = True, **options) -> str:
        before = sorted(tmp_path.rglob('*'))
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_info, preflight.clean_exit():
            preflight.check(config(path, **options), loops, dry_run=dry_run)
        assert exit_info.value.code == 2
        assert sorted(tmp_path.rglob('*')) == before
        (message,) = capfd.readouterr().err.splitlines()
        assert re.match(FORM, message) and message.endswith(HINT)
        return message

    return refuse


ENDLESS = dict(type='InfiniteSampler', shuffle=True)
TINY = {
    'a typo in the checkpoint hook': (
        {'default_hooks.checkpoint.intervl': 3},
        'default_hooks.checkpoint must have no key that nothing reads, got intervl. Did you mean interval?',
    ),
    'a word for the checkpoint hook': (
        {'default_hooks.checkpoint.every': 3},
        "default_hooks.checkpoint: its arguments must be among ['interval', ",
        "got 'every'.",
    ),
    'a typo in another hook': ({'default_hooks.logger.intervl': 3}, 'default_hooks.logger must have no', 'interval?'),
    'a word for another hook': ({'default_hooks.logger.every': 3}, 'default_hooks.logger must be built', "'every'"),
    'a hook without a type': ({'default_hooks.mine': dict(interval=3)}, 'default_hooks.mine must be built', '"type"'),
    'an interval that is no number': (
        {'default_hooks.logger.interval': 'ten'},
        'default_hooks.logger must be built',
        'interval must be an integer',
    ),
    'a best that is no metric': (
        {'default_hooks.checkpoint.save_best': 'mIou'},
        'CheckpointHook.save_best must name a metric of val_evaluator, aAcc, mIoU, mAcc, got ',
        "'mIou'. Did you mean mIoU?",
    ),
    'a best without a rule': (
        {'default_hooks.checkpoint.save_best': 'other'},
        'default_hooks.checkpoint must be built',
    ),
    'a custom hook': (
        {'custom_hooks': [dict(type='EMAHook', moment=0.1)]},
        'custom_hooks, EMAHook, must fit the config',
        'moment',
    ),
    'a priority': ({'custom_hooks': [dict(type='EMAHook', priority='SOON')]}, 'custom_hooks[0] must be built', 'SOON'),
    'no iterations': ({'train_cfg.max_iters': 0}, 'train_cfg.max_iters must be a positive integer, got 0.'),
    'iterations in words': (
        {'train_cfg.max_iters': 'six'},
        "train_cfg.max_iters must be a positive integer, got 'six'.",
    ),
    'validation never due': (
        {'train_cfg.val_interval': 0},
        'train_cfg.val_interval must be a positive integer, got 0.',
    ),
    'later never due': (
        {'train_cfg.dynamic_intervals': [(3, 0)]},
        'train_cfg.dynamic_intervals from 3 on must be a positive integer, got 0.',
    ),
    'an argument of the loop': ({'train_cfg.max_epoch': 3}, 'train_cfg must be built', "argument 'max_epoch'"),
    'an argument of validation': ({'val_cfg.fp_16': True}, 'val_cfg must be built', "argument 'fp_16'"),
    'an endless sampler in validation': (
        {'val_dataloader.sampler.type': 'InfiniteSampler'},
        'val_dataloader.sampler must end within a ValLoop, got InfiniteSampler',
    ),
    'no batch': (
        {'train_dataloader.batch_size': 7, 'train_dataloader.drop_last': True},
        'train_dataloader must give at least one batch, got none of 6 samples.',
    ),
    'workers': ({'train_dataloader.persistent_workers': True}, 'train_dataloader must be built', 'persistent_workers'),
    'an argument of a loader': ({'val_dataloader.batchsize': 1}, 'val_dataloader must be built', "'batchsize'"),
    'an argument of a data set': ({'train_dataloader.dataset.root': 'x'}, 'train_dataloader must be built', "'root'"),
    'an argument of a transform': (
        {'train_dataloader.dataset.pipeline.2.crop_sise': 32},
        'train_dataloader must be built',
        "argument 'crop_sise'. Did you mean crop_size?",
    ),
    'a pipeline without labels': (
        {'train_dataloader.dataset.pipeline': [dict(type='LoadImageFromFile'), dict(type='RandomFlip', prob=2)]},
        'train_dataloader must be built',
    ),
    'the optimizer': (
        {'optim_wrapper.optimizer.lrr': 1},
        'optim_wrapper must be built',
        "argument 'lrr'. Did you mean lr",
    ),
    'its wrapper': ({'optim_wrapper.lr_mul': 0.1}, 'optim_wrapper must be built', "argument 'lr_mul'"),
    'its rate': ({'optim_wrapper.optimizer.lr': -1.0}, 'optim_wrapper must be built', 'Invalid learning rate: -1.0'),
    'its rate in words': ({'optim_wrapper.optimizer.lr': 'big'}, 'optim_wrapper must be built'),
    'its clipping': ({'optim_wrapper.clip_grad': dict(max_nrm=1)}, 'optim_wrapper must take a step', "'max_nrm'"),
    'a misspelt multiplier': (
        {'optim_wrapper.paramwise_cfg': dict(norm_decay_mul=0.0)},
        'paramwise_cfg must have no key that nothing reads, got norm_decay_mul. Did you mean norm_decay_mult?',
    ),
    'a misspelt multiplier of a parameter': (
        {'optim_wrapper.paramwise_cfg': dict(custom_keys=dict(backbone=dict(lr_mul=0.1)))},
        'optim_wrapper: paramwise_cfg.custom_keys.backbone must have no key',
        'got lr_mul. Did you mean lr_mult?',
    ),
    'a multiplier of nothing': (
        {'optim_wrapper.paramwise_cfg': dict(lr_mul=0.1)},
        'paramwise_cfg must have lr_mul in custom_keys, by names of parameters, got it in none.',
    ),
    'the constructor': ({'optim_wrapper.constructor': 'Other'}, 'optim_wrapper'),
    'a schedule': (
        {'param_scheduler.0.pwer': 2},
        'param_scheduler must be built',
        "argument 'pwer'. Did you mean power?",
    ),
    'a schedule of negative length': ({'param_scheduler.0.end': -6}, 'param_scheduler must be built', 'end'),
    'a metric': (
        {'val_evaluator.iou_metric': 'mIoU'},
        'val_evaluator must have no key that nothing reads',
        'iou_metrics?',
    ),
    'what it measures': ({'val_evaluator.iou_metrics': ['mIuO']}, 'val_evaluator must judge a prediction', 'mIuO'),
    'a metric of another task': (
        {'val_evaluator': [dict(type='mmpretrain.Accuracy')]},
        'val_evaluator must judge a prediction for val_dataloader',
    ),
    'the visualizer': ({'visualizer.backends': []}, 'visualizer must be built', "argument 'backends'"),
    'a backend without its package': (
        {'visualizer.vis_backends': [dict(type='WandbVisBackend')]},
        'visualizer: vis_backends must be installed, got a WandbVisBackend without wandb.',
    ),
    'the log': ({'log_processor.window_sise': 3}, 'log_processor must be built', 'window_sise'),
    'its level': ({'log_level': 'LOUD'}, 'log_level must be built', 'LOUD'),
    'sliding': (
        {'model.test_cfg.mode': 'slid'},
        'model must predict a sample of val_dataloader',
        'slid',
    ),
    'sliding without a window': ({'model.test_cfg.mode': 'slide'}, 'model must predict a sample of val_dataloader'),
    'an argument of the model': ({'model.decode_head.scales': [1]}, 'model must be built', "'scales'"),
    'a head of another width': (
        {'model.decode_head.in_channels': [32, 32, 32, 16]},
        'model must have a loss for a sample of train_dataloader, got RuntimeError',
    ),
    'a layer that is not there': ({'model.auxiliary_head.in_index': 9}, 'model must have a loss', 'IndexError'),
    'a misspelt option': (
        {'optim_wraper.optimizer.lr': 1e-3},
        '--cfg-options must name a key of the config, got optim_wraper.optimizer.lr. Did you mean optim_wrapper?',
    ),
    'an option of nothing': ({'lr_mul': 0.1}, '--cfg-options must name a key of the config, got lr_mul.'),
    'half a test': ({'test_cfg': None}, 'config must set test_cfg, got none.'),
}


@pytest.mark.parametrize('case', TINY)
def test_refused_by_name(refused, tiny_config, case):
    options, *expected = TINY[case]
    message = refused(tiny_config, **options)
    assert all(text in message for text in expected), message


CLS = {
    'more ranks than classes': (
        {'val_evaluator.topk': (1, 50)},
        'val_evaluator must judge a prediction for val_dataloader, got ValueError: Top-50 accuracy is unavailable',
    ),
    'an endless sampler in epochs': (
        {'train_dataloader.sampler.type': 'InfiniteSampler'},
        'train_dataloader.sampler must end within a EpochBasedTrainLoop, got InfiniteSampler, which goes on. '
        'Use DefaultSampler, or an IterBasedTrainLoop',
    ),
    'no epochs': ({'train_cfg.max_epochs': 0}, 'train_cfg.max_epochs must be a positive integer, got 0.'),
    'half an epoch': ({'train_cfg.max_epochs': 1.5}, 'train_cfg must be built', '1.5'),
    'an epoch-wise best': (
        {'default_hooks.checkpoint.save_best': 'accuracy/top3'},
        "got 'accuracy/top3'. Did you mean",
    ),
    'a width': ({'model.head.in_channels': 16}, 'model must have a loss for a sample of train_dataloader'),
    'a schedule of another place': ({'param_scheduler.0.convert_to_iter': True}, 'param_scheduler'),
    'a rate of batches': ({'auto_scale_lr': dict(base_batch_size='big', enable=True)}, 'auto_scale_lr must be built'),
}


@pytest.mark.parametrize('case', CLS)
def test_a_classifier_is_refused_by_name(refused, tiny_cls_config, case):
    options, *expected = CLS[case]
    message = refused(tiny_cls_config, **options)
    assert all(text in message for text in expected), message


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({'test_dataloader.sampler.type': 'InfiniteSampler'}, 'test_dataloader.sampler must end within a TestLoop'),
        ({'test_evaluator.topk': (1, 50)}, 'test_evaluator must judge a prediction for test_dataloader'),
        ({'test_cfg.fp61': True}, 'test_cfg must be built'),
    ],
)
def test_a_test_is_refused_by_name(refused, tiny_cls_config, options, expected):
    assert expected in refused(tiny_cls_config, ('test',), **options)


def test_without_samples_the_model_is_not_tried(tiny_cls_config):
    preflight.check(config(tiny_cls_config, **{'val_evaluator.topk': (1, 50)}), ('train', 'val'), dry_run=False)


def test_test_time_augmentation_is_tried(refused, tiny_config):
    cfg = config(tiny_config)
    preflight.use_tta(cfg)
    preflight.check(cfg, ('test',))
    cfg.tta_model.type = 'SegTTAModl'
    cfg.model.type = 'SegTTAModl'
    with pytest.raises(ValueError, match="model.type must be a registered type, got 'SegTTAModl'. Did you mean Seg"):
        preflight.check(cfg, ('test',))


def states() -> list:
    """What a run starts from in its process."""
    numbers = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return [*numbers, *(list(kind._instance_dict) for kind in (MMLogger, MessageHub))]


def test_nothing_is_left_behind(tiny_config, tmp_path, monkeypatch):
    """Also by hooks, metrics and visualizers that make folders or files, and by models that count passes."""
    monkeypatch.chdir(tmp_path)
    metric = dict(type='IoUMetric', iou_metrics=['mIoU'], output_dir=str(tmp_path / 'metric'))
    files = dict(type='DumpResults', out_file_path=str(tmp_path / 'all.pkl'))
    cfg = config(
        tiny_config,
        val_evaluator=[metric, files],
        custom_hooks=[dict(type='EMAHook'), dict(type='mmdyt.FLOPsHook')],
        visualizer=dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend', save_dir=str(tmp_path / 'vis'))]),
    )
    preflight.check(cfg, ())  # whatever mmengine imports once in a process, it logs
    text, before = cfg.pretty_text, states()
    preflight.check(cfg, ('train', 'val'))
    assert states() == before
    assert cfg.pretty_text == text
    assert not list(tmp_path.iterdir())
