"""Sparse-Tuning, ViT-B/16, linear head, ADE20K, k = 0.7; no number in the paper.

Patches whose token is no more keep the value with which they left (restore).

python tools/train.py configs/sparse_tuning/linear_vitb_ade20k.py
"""

_base_ = ['../dyt/linear_vitb_ade20k.py', '../_base_/methods/sparse_tuning.py']

model = dict(backbone=dict(restore='stale', **_base_.method))
