"""Parallel adapter (AdaptFormer's form), ViT-B/16, Kinetics-400; arXiv 2403.11808, video table: 75.53.

python tools/train.py configs/baselines/vitb_adapter_k400.py
"""

_base_ = ['../dyt/vitb_k400.py', '../_base_/methods/adapter.py']

model = dict(backbone=_base_.method)
