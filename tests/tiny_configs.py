"""Configs on the repository's own bases that train in seconds; conftest.py draws the data of most."""

from pathlib import Path

TINY_ARCH = dict(embed_dims=32, num_layers=4, num_heads=2, feedforward_channels=64)
TINY_CONFIG = """
_base_ = [
    '{root}/configs/_base_/models/dyt_upernet_vitb.py',
    '{root}/configs/_base_/datasets/camvid.py',
    '{root}/configs/_base_/schedules/adamw_160k.py',
    '{root}/configs/_base_/runtime/mmseg.py',
]
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(
        arch=dict(_delete_=True, **{arch}), img_size=(64, 64), out_indices=(0, 1, 2, 3), adapter=dict(bottleneck=4),
        init_cfg=dict(checkpoint='{pretrained}')),
    neck=dict(embed_dim=32, norm_cfg=norm_cfg),
    decode_head=dict(
        in_channels=[32, 32, 32, 32], pool_scales=(1, 2), channels=16, num_classes=3, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=32, channels=16, num_classes=3, norm_cfg=norm_cfg),
    test_cfg=dict(_delete_=True, mode='whole'))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomCrop', crop_size=(64, 64)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='Resize', scale=(96, 64), keep_ratio=True), dict(type='Resize', scale=(144, 96), keep_ratio=True)],
        [dict(type='RandomFlip', prob=0.), dict(type='RandomFlip', prob=1.)],
        [dict(type='LoadAnnotations', reduce_zero_label=True)],
        [dict(type='PackSegInputs')],
    ]),
]
metainfo = dict(classes=('sky', 'road', 'car'), palette=[[0, 0, 255], [90, 90, 90], [255, 0, 0]])
dataset = dict(data_root='{data}', metainfo=metainfo, img_suffix='.png')
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(pipeline=train_pipeline, **dataset))
val_dataloader = dict(
    batch_size=1, num_workers=0, persistent_workers=False, dataset=dict(pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader

param_scheduler = [dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=6)]
train_cfg = dict(max_iters=6, val_interval=3)
default_hooks = dict(checkpoint=dict(interval=3), logger=dict(interval=1))
log_processor = dict(window_size=1)
"""
TINY_CLS_CONFIG = """
_base_ = [
    '{root}/configs/_base_/models/dyt_vitb_cls.py',
    '{root}/configs/_base_/datasets/cifar100_1k.py',
    '{root}/configs/_base_/schedules/adamw_vtab1k.py',
    '{root}/configs/_base_/runtime/mmpretrain.py',
]
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, **{arch}), img_size=32, patch_size=16, adapter=dict(bottleneck=4, scale=1.0),
        init_cfg=dict(checkpoint='{pretrained}')),
    head=dict(num_classes=3, in_channels=32))
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(32, 32), backend='pillow', interpolation='bicubic'),
    dict(type='PackInputs'),
]
dataset = dict(data_root='{data}', pipeline=pipeline)
loader = dict(batch_size=6, num_workers=0, persistent_workers=False)
train_dataloader = dict(dataset=dict(ann_file='train.txt', **dataset), **loader)
val_dataloader = dict(dataset=dict(ann_file='test.txt', **dataset), **loader)
test_dataloader = val_dataloader
param_scheduler = [dict(type='LinearLR', start_factor=0.5, begin=0, end=1, convert_to_iter_based=True)]
optim_wrapper = dict(optimizer=dict(lr=1e-2))
train_cfg = dict(max_epochs=8, val_interval=8)
default_hooks = dict(checkpoint=dict(interval=8), logger=dict(interval=1))
"""
TINY_VIDEO_CONFIG = """
_base_ = [
    '{root}/configs/_base_/models/dyt_vitb_video.py',
    '{root}/configs/_base_/datasets/clips_224.py',
    '{root}/configs/_base_/schedules/adamw_video.py',
    '{root}/configs/_base_/runtime/mmaction.py',
]
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, **{arch}), img_size=32, patch_size=16, adapter=dict(bottleneck=4, scale=1.0),
        init_cfg=dict(checkpoint='{pretrained}')),
    neck=dict(in_channels=32, aggregator=dict(num_heads=2)),
    cls_head=dict(num_classes=3, in_channels=32, topk=(1, )))
size = [dict(type='Resize', scale=(32, 32), keep_ratio=False)]
train_pipeline = _base_.open_clip + _base_.uniform_frames + _base_.decode_clip + size + _base_.pack_clip
crops = [dict(type='Resize', scale=(-1, 32)), dict(type='ThreeCrop', crop_size=32)]
test_pipeline = _base_.open_clip + _base_.uniform_test_frames + _base_.decode_clip + crops + _base_.pack_clip
dataset = dict(data_root='{data}', data_prefix=dict(video='videos'))
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(batch_size=3, dataset=dict(ann_file='train.txt', pipeline=train_pipeline, **dataset), **loader)
val_dataloader = dict(batch_size=2, dataset=dict(ann_file='val.txt', pipeline=test_pipeline, **dataset), **loader)
test_dataloader = val_dataloader
val_evaluator = dict(metric_options=dict(top_k_accuracy=dict(topk=(1, ))))
test_evaluator = val_evaluator
param_scheduler = [dict(type='LinearLR', start_factor=0.5, begin=0, end=1, convert_to_iter_based=True)]
optim_wrapper = dict(optimizer=dict(lr=1e-2))
train_cfg = dict(max_epochs=8, val_interval=8)
default_hooks = dict(checkpoint=dict(interval=8), logger=dict(interval=1))
"""
TINY_VTAB_CONFIG = """
_base_ = [
    '{root}/configs/_base_/models/dyt_vitb_cls.py',
    '{root}/configs/_base_/datasets/vtab1k.py',
    '{root}/configs/_base_/schedules/adamw_vtab1k.py',
    '{root}/configs/_base_/runtime/mmpretrain.py',
]
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, **{arch}), adapter=dict(bottleneck=4), init_cfg=dict(checkpoint='{pretrained}')),
    head=dict(num_classes=_base_.num_classes, in_channels=32))
train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
train_cfg = dict(max_epochs=2, val_interval=1)
"""


def draw_vtab_task(folder: Path, classes: int) -> None:
    """Lists of VTAB-1K's names, 4 + 2 images to train on and 4 to test on."""
    import cv2
    import numpy as np

    rng = np.random.default_rng(0)
    (folder / 'images').mkdir(parents=True)
    lines = []
    for i in range(10):
        cv2.imwrite(str(folder / f'images/{i}.png'), rng.integers(0, 255, (20, 24, 3)).astype(np.uint8))
        lines.append(f'images/{i}.png {i % classes}')
    lists = dict(train800=lines[:4], val200=lines[4:6], train800val200=lines[:6], test=lines[6:])
    for name, part in lists.items():
        (folder / f'{name}.txt').write_text('\n'.join(part) + '\n')
