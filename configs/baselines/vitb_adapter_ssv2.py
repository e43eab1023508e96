"""Parallel adapter (AdaptFormer's form), ViT-B/16, Something-Something v2; arXiv 2403.11808, video table: 45.36.

python tools/train.py configs/baselines/vitb_adapter_ssv2.py
"""

_base_ = ['../dyt/vitb_ssv2.py', '../_base_/methods/adapter.py']

model = dict(backbone=_base_.method)
