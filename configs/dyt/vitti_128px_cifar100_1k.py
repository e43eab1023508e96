"""Dynamic Tuning (DyT), ViT-Ti/16 on 128 x 128 pixels, 1000 images of CIFAR-100; no number in the paper.

Small enough to compare methods on two processor cores; the result is in docs/methods.md.
python tools/convert_timm_vit.py vit_tiny_patch16_224_augreg_in21k_ft_in1k.pth pretrain/vit_tiny_patch16_224.pth
python tools/train.py configs/dyt/vitti_128px_cifar100_1k.py
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

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=2, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=0.0, begin=2, end=10, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=10, val_interval=10)
