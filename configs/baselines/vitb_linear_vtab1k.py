"""Linear probe, ViT-B/16 IN-21k on VTAB-1K; arXiv 2403.11808, VTAB table: 57.64.

python tools/train.py configs/baselines/vitb_linear_vtab1k.py
"""

_base_ = ['../dyt/vitb_vtab1k.py', '../_base_/methods/linear.py']

model = dict(backbone=_base_.method)
