"""Sparse-Tuning, ViT-B/16 IN-21k on CIFAR-100, k = 0.7; arXiv 2405.14700, figure 1: 92.31 at 11.7 G, 1.08 M tuned.

The paper does not say its recipe: it is that of Dynamic Tuning, for comparison.

python tools/train.py configs/sparse_tuning/vitb_cifar100.py
"""

_base_ = ['../dyt/vitb_cifar100.py', '../_base_/methods/sparse_tuning.py']

model = dict(backbone=_base_.method)
