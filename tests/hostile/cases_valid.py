"""What stock tools accept, and people do: it must go on working here."""

import spoil
import torch
from case import refused, works


def text(name: str, world: str, extra: str, command: str = 'train {}', check=None):
    """A config with these lines behind it."""
    return works('valid', command.format(world), spoil.named(name, spoil.append('config.py', f'\n{extra}\n')), check)


def setting(world: str, *settings: str, tool: str = 'train', before: str = ''):
    """A config with these settings."""
    target = ' {ckpt}' if tool == 'test' else ''
    return works('valid', f'{tool} {world}{target}{before} --cfg-options {" ".join(settings)}')


def _space(here):
    (here.parent / 'my work').mkdir()


def _new_style(here):
    """The config in mmengine's new style: Python objects in the place of names."""
    from mmengine.config import Config

    Config.fromfile(here / 'config.py').dump(here / 'base.py')
    (here / 'config.py').write_text(
        'from mmengine.config import read_base\n'
        'from mmengine.optim import OptimWrapper\n'
        'from torch.optim import AdamW\n\n'
        'with read_base():\n'
        '    from .base import *\n'
        'optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=AdamW, lr=1e-3))\n'
    )


def _module(here):
    """A transform of one's own."""
    (here / 'my_transforms.py').write_text("""
from mmpretrain.registry import TRANSFORMS


@TRANSFORMS.register_module()
class Bright:
    def __init__(self, by=1):
        self.by = by

    def __call__(self, results):
        results['img'] = results['img'] // 2 + self.by
        return results
""")


def _dino(content):
    content['state_dict']['backbone.mask_token'] = torch.zeros(1, 32)


SURPLUS = [
    works('valid', f'train {world} --cfg-options {option}', check=lambda here, said: 'will not be trained' in said)
    for world, option in (
        ('seg', 'model.decode_head.num_classes=4'),
        ('seg', 'model.auxiliary_head.num_classes=4'),
    )
]
SETTINGS = [
    setting('seg', 'model.backbone.tuned=[]'),
    setting('seg', 'default_hooks.checkpoint.max_keep_ckpts=0'),
    setting('cls', 'model.head.topk=[1,50]'),
    setting('cls', 'model.backbone.adapter.type=mmdyt.MoEAdapter', 'model.backbone.adapter.routing=clip'),
    setting('cls', 'train_cfg.val_begin=-1'),
    setting('cls', 'model.head.num_classes=4'),  # a list of labels does not say how many classes there are
    setting('video', 'model.cls_head.num_classes=5'),
    setting('video', 'train_dataloader.dataset.pipeline.1.clip_len=99'),
    *(works('valid', f'train {world} --method vpt_deep --method-options length=0') for world in ('seg', 'cls')),
    setting('seg', 'train_dataloader.batch_size=3'),
    setting('seg', 'train_dataloader.num_workers=2', 'train_dataloader.persistent_workers=True'),
    setting('seg', 'val_dataloader.num_workers=1'),
    setting('seg', 'optim_wrapper.clip_grad.max_norm=1.0'),
    setting('seg', 'optim_wrapper.accumulative_counts=2'),
    setting('seg', 'optim_wrapper.paramwise_cfg.custom_keys.decode_head.lr_mult=10.0'),
    setting(
        'seg',
        'optim_wrapper.optimizer._delete_=True',
        'optim_wrapper.optimizer.type=SGD',
        'optim_wrapper.optimizer.lr=0.01',
    ),
    setting('seg', 'default_hooks.checkpoint.save_best=mIoU'),
    setting('seg', 'default_hooks.checkpoint.save_best=auto', 'default_hooks.checkpoint.rule=greater'),
    setting('seg', 'default_hooks.checkpoint.max_keep_ckpts=-1'),
    setting('seg', 'default_hooks.visualization.draw=True', 'default_hooks.visualization.interval=1'),
    setting('seg', 'val_evaluator.iou_metrics=[mIoU,mDice,mFscore]'),
    setting('seg', 'model.test_cfg.mode=slide', 'model.test_cfg.crop_size=[64,64]', 'model.test_cfg.stride=[32,32]'),
    setting('seg', 'model.backbone.dispatch=layer'),
    setting('seg', 'model.backbone.dispatch=attn_mlp'),
    setting('seg', 'model.backbone.dispatcher=None'),
    setting('seg', 'model.backbone.adapter=None'),
    setting('seg', 'model.auxiliary_head=None'),
    setting('seg', 'model.decode_head.dropout_ratio=0'),
    setting('seg', 'model.decode_head.loss_decode.class_weight=[1.0,2.0,0.5]'),
    setting(
        'seg',
        'model.decode_head.loss_decode.avg_non_ignore=True',
        'model.decode_head.loss_decode.class_weight=[1.0,2.0,0.5]',
    ),
    setting('seg', 'model.decode_head.sampler.type=OHEMPixelSampler', 'model.decode_head.sampler.thresh=0.7'),
    setting('seg', 'model.decode_head.loss_decode.type=FocalLoss', 'model.decode_head.loss_decode.use_sigmoid=True'),
    setting('seg', 'model.decode_head.loss_decode.type=DiceLoss', 'model.decode_head.loss_decode.use_sigmoid=False'),
    setting('seg', 'randomness.seed=None'),
    setting('seg', 'randomness.deterministic=True'),
    setting('seg', 'log_level=DEBUG'),
    setting('seg', 'env_cfg.mp_cfg.opencv_num_threads=1'),
    setting('seg', 'val_cfg=None', 'val_dataloader=None', 'val_evaluator=None'),
    setting('seg', 'test_cfg=None', 'test_dataloader=None', 'test_evaluator=None'),
    setting('seg', 'train_cfg.val_interval=100'),
    setting('seg', 'train_cfg.max_iters=1'),
    setting('seg', 'load_from={run}/last.pth'),
    setting('seg', 'model.auxiliary_head=None', tool='test'),
    setting('seg', 'test_dataloader.batch_size=1', tool='test', before=' --tta'),
    setting('seg', 'test_dataloader.num_workers=1', tool='test', before=' --complete'),
    setting('seg', 'test_evaluator.iou_metrics=[mDice]', tool='test', before=' --random-masks'),
    setting('seg', 'test_evaluator.output_dir={root}/predicted', tool='test'),
    setting('seg', 'test_dataloader.batch_size=1', tool='test', before=' --target-rate 0.5 --rule global'),
    setting('seg', 'test_dataloader.batch_size=1', tool='test', before=' --show-dir {root}/painted'),
    setting('cls', 'train_dataloader.batch_size=5'),
    setting('cls', 'train_dataloader.batch_size=100'),
    setting('cls', 'train_dataloader.num_workers=2', 'train_dataloader.persistent_workers=True'),
    setting('cls', 'train_dataloader.drop_last=True'),
    setting('cls', 'val_evaluator.topk=[1,2,3]'),
    setting('cls', 'model.head.loss.type=LabelSmoothLoss', 'model.head.loss.label_smooth_val=0.1'),
    setting('cls', 'model.backbone.skip_unread=True'),
    setting('cls', 'model.backbone.drop_path_rate=0.1'),
    setting('cls', 'auto_scale_lr.enable=True'),
    setting('cls', 'train_cfg.val_begin=2', 'train_cfg.val_interval=1'),
    setting(
        'cls',
        'default_hooks.early_stopping.type=EarlyStoppingHook',
        'default_hooks.early_stopping.monitor=accuracy/top1',
    ),
    setting('cls', 'test_dataloader.batch_size=4', tool='test', before=' --dump {root}/predictions.pkl'),
    setting('video', 'train_dataloader.batch_size=2'),
    setting('video', 'train_dataloader.num_workers=1'),
    setting('video', 'model.test_cfg.max_testing_views=1', tool='test'),
    setting('video', 'model.backbone.adapter.type=mmdyt.MoEAdapter'),
    *(works('valid', f'train {world} --amp') for world in ('seg', 'cls', 'video')),
    works('valid', 'train cls --cfg-options optim_wrapper.type=AmpOptimWrapper optim_wrapper.dtype=bfloat16 --amp'),
    works('valid', 'train cls', env=(('WORLD_SIZE', '1'), ('RANK', '0'))),
    works('valid', 'train cls --work-dir "{root}/my work"', spoil.named('a folder with a space', _space)),
    works('valid', 'train cls --work-dir {root}/Ünïcode/日本'),
    works('valid', 'vtab vtab --root {here}/root --tasks cifar'),
    works('valid', 'compare cls --methods linear lora,rank=2 --no-timing'),
    works('valid', 'benchmark_training cls --methods adapter lora --rounds 1'),
]

# what the leaf says of the data, over what the base says
WHOLE = """
whole = dict(_base_.train_dataloader.dataset, **train_dataloader['dataset'])
train_dataloader['dataset'] = dict(_delete_=True, type='{}', {})
"""
SAME = "train_dataloader['dataset']"
CONFIGS = [
    text(
        'Mixup',
        'cls',
        """
model['data_preprocessor'] = dict(num_classes=3)
model['train_cfg'] = dict(augments=[dict(type='Mixup', alpha=0.8)])
""",
    ),
    text(
        'CutMix and Mixup',
        'cls',
        """
model['data_preprocessor'] = dict(num_classes=3)
mixes = [dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]
model['train_cfg'] = dict(augments=mixes, probs=[0.3, 0.7])
""",
    ),
    *(
        text(f'{kind} of the data', world, WHOLE.format(kind, f'dataset=whole, {more}'))
        for world, kind, more in (
            ('cls', 'RepeatDataset', 'times=2'),
            ('cls', 'ClassBalancedDataset', 'oversample_thr=0.5'),
            ('cls', 'KFoldDataset', 'fold=0, num_splits=3'),
            ('seg', 'RepeatDataset', 'times=2'),
            ('video', 'RepeatDataset', 'times=2'),
        )
    ),
    *(text('joined data', world, WHOLE.format('ConcatDataset', 'datasets=[whole, whole]')) for world in ('cls', 'seg')),
    text('some of the data', 'seg', f"{SAME}['indices'] = 4"),
    text(
        'two evaluators',
        'seg',
        """
val_evaluator = [
    dict(type='IoUMetric', iou_metrics=['mIoU']), dict(type='IoUMetric', iou_metrics=['mDice'], prefix='dice')]
""",
    ),
    text(
        'two evaluators',
        'cls',
        "val_evaluator = [dict(type='Accuracy', topk=(1, )), dict(type='SingleLabelMetric', num_classes=3)]",
    ),
    text('a moving average', 'cls', "custom_hooks = [*_base_.custom_hooks, dict(type='EMAHook', momentum=1e-3)]"),
    text('no custom hooks', 'cls', 'custom_hooks = []'),
    text(
        'a warm-up and a cosine',
        'seg',
        """
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=2),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=2, end=6, T_max=4)]
""",
    ),
    text('no scheduler', 'cls', 'param_scheduler = []'),
    text(
        'iterations',
        'cls',
        """
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=4, val_interval=4)
param_scheduler = []
train_dataloader['sampler'] = dict(type='InfiniteSampler', shuffle=True)
default_hooks['checkpoint'] = dict(type='CheckpointHook', by_epoch=False, interval=4)
log_processor = dict(by_epoch=False)
""",
    ),
    text(
        'epochs',
        'seg',
        """
train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=1, val_interval=1)
param_scheduler = []
train_dataloader['sampler'] = dict(type='DefaultSampler', shuffle=True)
default_hooks['checkpoint'] = dict(type='CheckpointHook', by_epoch=True, interval=1)
log_processor = dict(by_epoch=True)
""",
    ),
    text(
        "variables of one's own",
        'cls',
        """
crop_size = 32
img_norm_cfg = dict(mean=[0], std=[1])
lr = 0.1
batch_size = 4
classes = ['a']
model_name = 'x'
""",
    ),
    text('class names', 'cls', f"{SAME}['metainfo'] = dict(classes=('a', 'b', 'c'))"),
    text(
        'two auxiliary heads',
        'seg',
        """
head = dict(_base_.model.auxiliary_head, num_classes=3, in_channels=32, channels=16, norm_cfg=norm_cfg)
model['auxiliary_head'] = [head, dict(head, in_index=1)]
""",
    ),
    text('a linear probe', 'cls', "model['backbone'].update(adapter=None, dispatcher=None)"),
    *(
        text(name, 'cls', f"{SAME}['pipeline'] = [pipeline[0], {transforms}, *pipeline[1:]]")
        for name, transforms in (
            ('colours and erasing', "dict(type='ColorJitter', brightness=0.4), dict(type='RandomErasing')"),
            (
                'RandAugment',
                "dict(type='RandAugment', policies='timm_increasing', num_policies=2, total_level=10, "
                'magnitude_level=9)',
            ),
            (
                'transforms of torchvision',
                "dict(type='NumpyToPIL', to_rgb=True), dict(type='torchvision/RandomHorizontalFlip'), "
                "dict(type='PILToNumpy', to_bgr=True)",
            ),
        )
    ),
    works(
        'valid',
        'train cls',
        spoil.both(
            _module,
            spoil.append(
                'config.py',
                """
custom_imports = dict(imports=[*_base_.custom_imports['imports'], 'my_transforms'])
train_dataloader['dataset']['pipeline'] = [pipeline[0], dict(type='Bright', by=3), *pipeline[1:]]
""",
            ),
        ),
        env=(('MODULES', '{here}'),),
    ),
    works('valid', 'train cls', spoil.named('a new-style config', _new_style)),
    works('valid', 'train cls --amp', spoil.named('a new-style config', _new_style)),
    works('valid', 'train cls', spoil.checkpoint('a mask_token of DINOv2', _dino, '../pretrained.pth')),
    refused(
        'valid',
        'train cls',
        'LoRAModel',
        change=spoil.append(
            'config.py',
            """
vit = dict(model['backbone'], type='mmdyt.DyTVisionTransformer')
model['backbone'] = dict(_delete_=True, type='LoRAModel', module=vit, targets=[dict(type='.*qkv')])
""",
        ),
    ),
]

CASES = SURPLUS + SETTINGS + CONFIGS
