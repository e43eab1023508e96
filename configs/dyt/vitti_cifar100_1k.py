"""Dynamic Tuning (DyT), ViT-Ti/16, 1000 images of CIFAR-100; no number in the paper.

The result is in docs/results/runs.md.

python tools/convert_vit.py vit_tiny_patch16_224_augreg_in21k_ft_in1k.pth pretrain/vit_tiny_patch16_224.pth
python tools/train.py configs/dyt/vitti_cifar100_1k.py --amp
"""

_base_ = [
    '../_base_/models/dyt_vitb_cls.py',
    '../_base_/datasets/cifar100_1k.py',
    '../_base_/schedules/adamw_vtab1k.py',
    '../_base_/runtime/mmpretrain.py',
]

model = dict(
    backbone=dict(
        arch='deit-tiny',
        adapter=dict(bottleneck=64, scale=1.0),
        init_cfg=dict(checkpoint='pretrain/vit_tiny_patch16_224.pth')),
    head=dict(num_classes=_base_.num_classes, in_channels=192))

# short for processors: as many steps as 30 epochs of 64 images take, on half of the images
train_dataloader = dict(batch_size=32)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=2, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=0.0, begin=2, end=15, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=15, val_interval=15)
