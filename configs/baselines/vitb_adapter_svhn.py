"""Parallel adapter (AdaptFormer), ViT-B/16 on SVHN; arXiv 2403.11808, image classification table: 97.23.

python tools/train.py configs/baselines/vitb_adapter_svhn.py
"""

_base_ = ['../dyt/vitb_svhn.py', '../_base_/methods/adapter.py']

model = dict(backbone=_base_.method)
