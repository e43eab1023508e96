"""Parallel adapter (AdaptFormer), ViT-B/16 on Food-101; arXiv 2403.11808, image classification table: 90.84.

python tools/train.py configs/baselines/vitb_adapter_food101.py
"""

_base_ = ['../dyt/vitb_food101.py', '../_base_/methods/adapter.py']

model = dict(backbone=_base_.method)
