"""Dynamic Tuning (DyT), ViT-Ti/16 on 128 x 128 pixels, 1000 images of CIFAR-100; no number in the paper.

What docs/methods.md compares, small enough for two processor cores:
python tools/compare.py configs/dyt/vitti_128px_cifar100_1k.py --methods linear adapter dyt evidence
"""

_base_ = './vitti_cifar100_1k.py'

pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 128), backend='pillow', interpolation='bicubic'),
    dict(type='PackInputs'),
]
model = dict(backbone=dict(img_size=128))
train_dataloader = dict(dataset=dict(pipeline=pipeline))
val_dataloader = dict(dataset=dict(pipeline=pipeline))
test_dataloader = val_dataloader
