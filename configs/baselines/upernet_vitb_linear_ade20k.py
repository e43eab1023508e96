"""Frozen ViT-B/16, UPerNet on ADE20K 512 x 512; arXiv 2403.11808, segmentation table, linear: 43.86 mIoU.

python tools/train.py configs/baselines/upernet_vitb_linear_ade20k.py
"""

_base_ = ['../dyt/upernet_vitb_ade20k.py', '../_base_/methods/linear.py']

model = dict(backbone=_base_.method)
