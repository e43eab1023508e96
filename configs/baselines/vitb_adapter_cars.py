"""Parallel adapter (AdaptFormer), ViT-B/16 on Stanford Cars; arXiv 2403.11808, image classification table: 87.33.

python tools/train.py configs/baselines/vitb_adapter_cars.py
"""

_base_ = ['../dyt/vitb_cars.py', '../_base_/methods/adapter.py']

model = dict(backbone=_base_.method)
