"""Parallel adapter (AdaptFormer's form), ViT-B/16, UPerNet, ADE20K; arXiv 2403.11808, segmentation table: 47.52 mIoU.

python tools/train.py configs/baselines/upernet_vitb_adapter_ade20k.py
"""

_base_ = ['../dyt/upernet_vitb_ade20k.py', '../_base_/methods/adapter.py']

model = dict(backbone=_base_.method)
