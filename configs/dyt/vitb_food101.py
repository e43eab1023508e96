"""Dynamic Tuning (DyT), ViT-B/16 IN-21k on Food-101; arXiv 2403.11808, image classification table: 90.32.

python tools/convert_vit.py jx_vit_base_patch16_224_in21k.pth pretrain/vit_base_patch16_224_in21k.pth
python tools/train.py configs/dyt/vitb_food101.py
"""

_base_ = [
    '../_base_/models/dyt_vitb_cls.py',
    '../_base_/datasets/food101.py',
    '../_base_/schedules/adamw_image_sets.py',
    '../_base_/runtime/mmpretrain.py',
]

model = dict(head=dict(num_classes=_base_.num_classes))
