"""A-ViT, all is tuned, DeiT-T on ImageNet; arXiv 2112.07658, table of results: 71.4 % at 0.8 G.

Known: gamma, beta, the losses and 100 epochs. Batch, learning rate and augmentation are those of our other image sets.

python tools/train.py configs/avit/vitti_full_imagenet.py
"""

_base_ = [
    '../_base_/models/dyt_vitb_cls.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/adamw_image_sets.py',
    '../_base_/runtime/mmpretrain.py',
    '../_base_/methods/avit.py',
]

model = dict(
    backbone=dict(
        arch='deit-tiny',
        dispatch='layer',
        adapter=None,
        dispatcher=dict(_delete_=True, **_base_.method_halt, score='channel', gamma=10.0, beta=30.0),
        tuned='all',
        init_cfg=dict(checkpoint='pretrain/deit_tiny_patch16_224.pth'),
    ),
    data_preprocessor=dict(normalization='imagenet'),
    head=dict(num_classes=_base_.num_classes, in_channels=192),
    **_base_.method_model,
)
optim_wrapper = dict(optimizer=dict(lr=_base_.optim_wrapper.optimizer.lr / 10))  # as --method full
