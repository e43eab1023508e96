"""Parallel adapter (AdaptFormer's form), ViT-B/16, VTAB-1K; arXiv 2403.11808, VTAB table: 74.75.

python tools/train.py configs/baselines/vitb_adapter_vtab1k.py
"""

_base_ = ['../dyt/vitb_vtab1k.py', '../_base_/methods/adapter.py']

model = dict(backbone=_base_.method)
