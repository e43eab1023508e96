"""What the tools of the host libraries take passes."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import TINY_ARCH
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmdyt import preflight
from mmdyt.preflight.check import check_lora
from mmdyt.preflight.checkpoints import check_fit, read_tensors
from mmdyt.preflight.datasets import check_data
from mmdyt.preflight.keys import check_arguments, check_keys, check_options, check_paramwise
from mmdyt.preflight.names import check_types

PYTHON_CONFIG = """
from mmengine.dataset import DefaultSampler
from mmengine.model import PretrainedInit
from mmengine.optim import {wrapper}
from mmpretrain.datasets import CustomDataset, LoadImageFromFile, PackInputs, Resize
from mmpretrain.evaluation import Accuracy
from mmpretrain.models import ClsDataPreprocessor, ImageClassifier, LinearClsHead, VisionTransformer
from torch.optim import SGD

default_scope = 'mmpretrain'
model = dict(
    type=ImageClassifier,
    data_preprocessor=dict(type=ClsDataPreprocessor, mean=[127.5] * 3, std=[127.5] * 3),
    backbone=dict(type=VisionTransformer, arch=dict({arch}), img_size=32, patch_size=16),
    head=dict(type=LinearClsHead, num_classes=3, in_channels=32))
pipeline = [dict(type=LoadImageFromFile), dict(type=Resize, scale=(32, 32)), dict(type=PackInputs)]
train_dataloader = dict(
    batch_size=6, num_workers=0, sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(type=CustomDataset, data_root='{data}', ann_file='train.txt', pipeline=pipeline))
val_dataloader = train_dataloader
val_evaluator = dict(type=Accuracy, topk=(1,))
train_cfg = dict(by_epoch=True, max_epochs=1)
val_cfg = dict()
optim_wrapper = dict(type={wrapper}, optimizer=dict(type=SGD, lr=0.1), clip_grad=dict(max_norm=1.0))
work_dir = 'nowhere'
launcher = 'none'
"""
MIXUP, CUTMIX = dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)
VIT = dict(type='VisionTransformer', arch=TINY_ARCH, img_size=32, patch_size=16)
TRANSFORMS = {
    'mmseg': dict(type='Albu', transforms=[dict(type='RandomBrightnessContrast', p=0.2)]),
    'mmpretrain': dict(type='Albumentations', transforms=[dict(type='OneOf', transforms=[dict(type='Blur', p=1.0)])]),
    'mmaction': dict(type='ImgAug', transforms=[dict(type='Rotate', rotate=(-20, 20))]),
}


def config(path: Path, **options) -> Config:
    args = Namespace(config=path, cfg_options=options, work_dir='nowhere', launcher='none', local_rank=0)
    return preflight.load_config(args)


def lora(module: dict) -> dict:
    return dict(type='LoRAModel', module=module, rank=4, alpha=4, targets=[dict(type='qkv')])


@pytest.mark.parametrize(
    'options',
    [
        {'model.data_preprocessor.num_classes': 3, 'model.train_cfg': dict(augments=[MIXUP])},
        {
            'model.data_preprocessor.num_classes': 3,
            'model.train_cfg': dict(augments=[MIXUP, CUTMIX], probs=[0.5, 0.5]),
        },
        {'model.data_preprocessor.num_classes': 3, 'model.data_preprocessor.batch_augments': dict(augments=[CUTMIX])},
        {
            'optim_wrapper.paramwise_cfg': dict(
                norm_decay_mult=0.0, custom_keys={'ln1': dict(decay_mult=0.0, betas=(0, 0))}
            )
        },
        {'custom_hooks': [dict(type='EMAHook', momentum=1e-4, priority='ABOVE_NORMAL')]},
        {'default_hooks.checkpoint.save_best': 'auto'},
        {'default_hooks.checkpoint.save_best': 'accuracy/top1'},
        {'default_hooks.checkpoint.save_best': 'gmacs', 'default_hooks.checkpoint.rule': 'less'},
        {
            'train_cfg': dict(_delete_=True, by_epoch=False, max_iters=4),
            'train_dataloader.sampler.type': 'InfiniteSampler',
        },
        {'optim_wrapper.accumulative_counts': 4},
    ],
)
def test_training_starts(tiny_cls_config, options):
    preflight.check(config(tiny_cls_config, **options), ('train', 'val'))


@pytest.mark.parametrize('scope', TRANSFORMS)
def test_transforms_of_other_libraries_are_theirs(scope):
    check_types(dict(pipeline=[TRANSFORMS[scope]]), scope)
    with pytest.raises(KeyError, match=r'pipeline\[0\].transforms\[0\].type must be a registered type'):
        inner = TRANSFORMS[scope]['transforms']
        check_types(dict(pipeline=[dict(type='RandomApply', transforms=inner)]), scope)


def test_a_lora_model_of_mmpretrain_is_trained_and_tested(tiny_cls_config, pretrained, tmp_path):
    init_cfg = dict(type='Pretrained', checkpoint=str(pretrained), prefix='backbone')
    backbone = dict(_delete_=True, **lora(dict(VIT, init_cfg=init_cfg)))
    model = {'model.type': 'ImageClassifier', 'model.backbone': backbone, 'custom_hooks': []}
    cfg = config(tiny_cls_config, **model)
    for key in ('target_rate', 'rate_weight', 'complete_weight', 'distill_weight'):
        cfg.model.pop(key, None)
    preflight.check(cfg, ('train', 'val'))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        built = MODELS.build(cfg.model)
    torch.save(dict(state_dict=built.state_dict()), tmp_path / 'lora.pth')
    cfg.load_from = str(tmp_path / 'lora.pth')
    preflight.check(cfg, ('test',))
    cfg.load_from, cfg.model.backbone.module.arch.num_layers = None, 5
    with pytest.raises(ValueError, match='checkpoint must fit the model'):
        preflight.check(cfg, ('train', 'val'))


@pytest.mark.parametrize(
    ('model', 'where'),
    [
        (dict(backbone=lora(dict(type='mmdyt.DyTVisionTransformer'))), 'model.backbone.module'),
        (lora(dict(type='ImageClassifier', backbone=dict(type='mmdyt.DyTVisionTransformer'))), 'model.module'),
    ],
)
def test_a_lora_model_around_our_own_is_refused(model, where):
    with pytest.raises(ValueError, match=f'^{where} must be no model of mmdyt within a LoRAModel'):
        check_lora(model)
    check_lora(dict(backbone=lora(VIT)))


def test_the_mask_token_of_dinov2_is_spare(tiny_model_cfg, pretrained):
    model = MODELS.build(tiny_model_cfg)
    tensors = read_tensors(str(pretrained), 'backbone') | dict(mask_token=torch.zeros(1, 32))
    check_fit(model.backbone, tensors, 'dinov2.pth', exact=False)
    check_fit(model, {f'backbone.{n}': t for n, t in tensors.items()}, 'dinov2.pth', exact=False)


def test_a_test_needs_no_auxiliary_head(tiny_config, trained):
    cfg = config(tiny_config, load_from=str(trained / 'iter_3.pth'))
    cfg.model.auxiliary_head = None
    preflight.check(cfg, ('test',))
    cfg.resume = True
    with pytest.raises(ValueError, match='unexpected, first auxiliary_head.'):
        preflight.check(cfg, ('train', 'val'))


def test_hidden_files_are_no_images(ade_root, tmp_path):
    for kind in ('images', 'annotations'):
        (tmp_path / kind).mkdir()
        for path in (ade_root / kind / 'training').iterdir():
            (tmp_path / kind / path.name).symlink_to(path)
    (tmp_path / 'images' / '._0.png').write_bytes(b'of another system')
    (tmp_path / 'images' / '.DS_Store').write_bytes(b'')
    folders = dict(img_path='images', seg_map_path='annotations')
    dataset = dict(type='mmseg.BaseSegDataset', data_root=str(tmp_path), data_prefix=folders, img_suffix='.png')
    check_data(Config(dict(dataset=dataset)).dataset, 'train')


@pytest.mark.parametrize('wrapper', ['OptimWrapper', 'AmpOptimWrapper'])
def test_a_python_config_trains_with_amp(tiny_cls_config, tmp_path, wrapper):
    file = tmp_path / 'python.py'
    arch = ', '.join(f'{name}={value}' for name, value in TINY_ARCH.items())
    file.write_text(PYTHON_CONFIG.format(wrapper=wrapper, arch=arch, data=tiny_cls_config.parent))
    cfg = config(file)
    preflight.use_amp(cfg)
    preflight.check(cfg, ('train', 'val'))
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=1.0)


@pytest.mark.parametrize('gpu', [False, True])
def test_amp_keeps_the_settings_of_amp(monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    kept = dict(optimizer=dict(type='SGD', lr=0.1), accumulative_counts=2)
    own = dict(loss_scale=512.0, dtype='bfloat16')
    cfg = Config(dict(optim_wrapper=dict(type='AmpOptimWrapper', **kept, **own)))
    preflight.use_amp(cfg)
    expected = dict(type='AmpOptimWrapper', **kept, **own) if gpu else dict(type='mmdyt.CPUAmpOptimWrapper', **kept)
    assert cfg.optim_wrapper == expected


@pytest.mark.parametrize('supported', [False, True])
def test_a_processor_without_bf16_is_told_of(monkeypatch, capfd, supported):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: supported)
    preflight.use_amp(Config(dict(optim_wrapper=dict(type='OptimWrapper'))))
    assert ('--amp: this processor has no instructions for bf16' in capfd.readouterr().err) != supported


def test_amp_needs_something_to_train():
    with pytest.raises(ValueError, match='--amp must find optim_wrapper in the config, got none.'):
        preflight.use_amp(Config(dict(model=dict())))


@pytest.mark.parametrize('key', ['num_classes', 'crop_size', 'norm_cfg', 'test_pipeline', 'train_dataset', 'models',
                                 'train_dataloader2', '_model', 'optimizer', 'lr_config', 'lr_mul'])  # fmt: skip
def test_variables_of_a_config_are_the_users_own(key):
    check_keys(Config({key: 1}))


@pytest.mark.parametrize(
    ('key', 'meant'),
    [
        ('optim_wraper', 'optim_wrapper'),
        ('trian_cfg', 'train_cfg'),
        ('val_dataloder', 'val_dataloader'),
        ('custom_hook', 'custom_hooks'),
        ('load_form', 'load_from'),
        ('param_shceduler', 'param_scheduler'),
    ],
)
def test_misspelt_keys_of_a_config_are_refused(key, meant):
    with pytest.raises(KeyError, match=f'got {key}. Did you mean {meant}'):
        check_keys(Config({key: 1, meant: 2}))


# a key near a known one, and the check of a config that has it
NEAR = {
    'eval_dataloader': check_keys,
    'test_dataloaders': check_keys,
    'intervals': lambda cfg: check_arguments(
        dict(type='CheckpointHook', intervals=3), 'mmengine', 'default_hooks.checkpoint', cfg.own_keys
    ),
    'bias_lr_mul': lambda cfg: check_paramwise(dict(paramwise_cfg=dict(bias_lr_mul=2)), cfg.own_keys),
    'lr_mul': lambda cfg: check_paramwise(dict(paramwise_cfg=dict(lr_mul=2)), cfg.own_keys),
    'decay_mlt': lambda cfg: check_paramwise(
        dict(paramwise_cfg=dict(custom_keys=dict(head=dict(decay_mlt=2)))), cfg.own_keys
    ),
}


@pytest.mark.parametrize('key', NEAR)
def test_a_key_near_another_passes_where_the_config_says_that_own_code_reads_it(key):
    with pytest.raises(KeyError, match=key):
        NEAR[key](Config({key: 1, 'own_keys': []}))
    NEAR[key](Config({key: 1, 'own_keys': [key]}))


@pytest.mark.parametrize('key', ['eval_dataloader', 'custom_hook'])
def test_the_refusal_of_a_key_says_how_to_keep_it(key):
    with pytest.raises(KeyError, match=rf"top of the config: own_keys = \['{key}'\]\."):
        check_keys(Config({key: 1}))


@pytest.mark.parametrize('own', ['eval_dataloader', [1], dict(eval_dataloader=1)])
def test_own_keys_are_a_list_of_names(own):
    with pytest.raises(ValueError, match='own_keys must be a list of names, got '):
        check_keys(Config(dict(own_keys=own)))


def test_options_that_a_config_has_or_a_host_reads_pass():
    check_options(Config(dict(num_classes=3)), {'num_classes': 4, 'randomness.seed': 1, 'find_unused_parameters': True})
    with pytest.raises(
        KeyError, match='--cfg-options must name a key of the config, got num_clases. Did you mean num_'
    ):
        check_options(Config(dict(num_classes=3)), {'num_clases': 4})


def test_parameters_have_whatever_their_optimizer_takes():
    own = dict(custom_keys={'head': dict(lr_mult=10, momentum=0.8), 'predictor': dict(fix_lr=True)}, _delete=True)
    check_paramwise(dict(paramwise_cfg=own | dict(num_layers=12, layer_decay_rate=0.9, decay_type='layer_wise')))
