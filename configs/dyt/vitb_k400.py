"""Dynamic Tuning (DyT), ViT-B/16 IN-21k on Kinetics-400; arXiv 2403.11808, video table: 75.28.

python tools/convert_vit.py jx_vit_base_patch16_224_in21k.pth pretrain/vit_base_patch16_224_in21k.pth
python tools/train.py configs/dyt/vitb_k400.py
"""

_base_ = [
    '../_base_/models/dyt_vitb_video.py',
    '../_base_/datasets/kinetics400.py',
    '../_base_/schedules/adamw_video.py',
    '../_base_/runtime/mmaction.py',
]

model = dict(cls_head=dict(num_classes=_base_.num_classes))
