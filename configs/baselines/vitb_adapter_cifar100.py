"""Parallel adapter (AdaptFormer's form), ViT-B/16, CIFAR-100; arXiv 2403.11808, image classification table: 92.03.

python tools/train.py configs/baselines/vitb_adapter_cifar100.py
"""

_base_ = ['../dyt/vitb_cifar100.py', '../_base_/methods/adapter.py']

model = dict(backbone=_base_.method)
