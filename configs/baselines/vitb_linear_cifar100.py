"""Linear probe, ViT-B/16 IN-21k on CIFAR-100; arXiv 2403.11808, image classification table: 85.87.

python tools/train.py configs/baselines/vitb_linear_cifar100.py
"""

_base_ = ['../dyt/vitb_cifar100.py', '../_base_/methods/linear.py']

model = dict(backbone=_base_.method)
