"""Sparse-Tuning, ViT-B/16, Kinetics-400, k = 0.7; arXiv 2405.14700, no number known.

The recipe is that of Dynamic Tuning, for comparison.

python tools/train.py configs/sparse_tuning/vitb_k400.py
"""

_base_ = ['../dyt/vitb_k400.py', '../_base_/methods/sparse_tuning.py']

model = dict(backbone=_base_.method)
