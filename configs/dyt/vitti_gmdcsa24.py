"""Dynamic Tuning (DyT), ViT-Ti/16, GMDCSA-24; no number in the paper.

The result is in docs/results/runs.md.

python tools/convert_vit.py vit_tiny_patch16_224_augreg_in21k_ft_in1k.pth pretrain/vit_tiny_patch16_224.pth
python tools/train.py configs/dyt/vitti_gmdcsa24.py --amp
"""

_base_ = [
    '../_base_/models/dyt_vitb_video.py',
    '../_base_/datasets/gmdcsa24.py',
    '../_base_/schedules/adamw_video.py',
    '../_base_/runtime/mmaction.py',
]

model = dict(
    backbone=dict(arch='deit-tiny', init_cfg=dict(checkpoint='pretrain/vit_tiny_patch16_224.pth')),
    neck=dict(in_channels=192, aggregator=dict(num_heads=3)),
    cls_head=dict(num_classes=_base_.num_classes, in_channels=192, topk=(1, )))

optim_wrapper = dict(optimizer=dict(lr=1e-3))  # high for 8 clips a step, since the run is short
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=4, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=0.0, begin=4, end=40, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=40, val_interval=40)
default_hooks = dict(logger=dict(interval=5), checkpoint=dict(interval=40))
