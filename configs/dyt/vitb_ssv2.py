"""Dynamic Tuning (DyT), ViT-B/16 IN-21k on Something-Something v2; arXiv 2403.11808, video table: 45.43.

python tools/convert_vit.py jx_vit_base_patch16_224_in21k.pth pretrain/vit_base_patch16_224_in21k.pth
python tools/train.py configs/dyt/vitb_ssv2.py
"""

_base_ = [
    '../_base_/models/dyt_vitb_video.py',
    '../_base_/datasets/ssv2.py',
    '../_base_/schedules/adamw_video.py',
    '../_base_/runtime/mmaction.py',
]

model = dict(cls_head=dict(num_classes=_base_.num_classes))

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=2, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=0.0, begin=2, end=50, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=50, val_interval=10)
