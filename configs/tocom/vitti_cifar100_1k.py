"""ToCom (arXiv 2408.06798), bridge of a ViT-Ti/16, from 1000 unlabelled images of CIFAR-100; no number in the paper.

The paper trains 10 epochs of ImageNet with 1e-3 for 512 images a step. Here steps are few, and 1e-3 is for 32.

python tools/convert_vit.py vit_tiny_patch16_224_augreg_in21k_ft_in1k.pth pretrain/vit_tiny_patch16_224.pth
python tools/train_compensator.py configs/tocom/vitti_cifar100_1k.py --out pretrain/vit_tiny_bridge.pth
"""

_base_ = ['../dyt/vitti_cifar100_1k.py', '../_base_/methods/tocom.py']

pretrained = dict(type='Pretrained', checkpoint='pretrain/vit_tiny_patch16_224.pth')
model = dict(
    type='mmdyt.CompensatorTrainer',
    backbone=_base_.method,
    head=dict(num_classes=1000, init_cfg=dict(prefix='head.', **pretrained)))

# DeiT's augmentation, but what mixes images
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=224, backend='pillow', interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='RandAugment', policies='timm_increasing', num_policies=2, total_level=10, magnitude_level=9,
         magnitude_std=0.5),
    dict(type='RandomErasing', erase_prob=0.25, mode='rand', min_area_ratio=0.02, max_area_ratio=1 / 3),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.05))
param_scheduler = [dict(type='CosineAnnealingLR', eta_min=0.0, begin=0, end=10, convert_to_iter_based=True)]
train_cfg = dict(max_epochs=10)
