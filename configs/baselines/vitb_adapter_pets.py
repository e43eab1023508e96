"""Parallel adapter (AdaptFormer), ViT-B/16 on Oxford-IIIT Pet; arXiv 2403.11808, image classification table: 94.46.

python tools/train.py configs/baselines/vitb_adapter_pets.py
"""

_base_ = ['../dyt/vitb_pets.py', '../_base_/methods/adapter.py']

model = dict(backbone=_base_.method)
