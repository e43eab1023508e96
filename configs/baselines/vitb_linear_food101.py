"""Linear probe, ViT-B/16 IN-21k on Food-101; arXiv 2403.11808, image classification table: 88.07.

python tools/train.py configs/baselines/vitb_linear_food101.py
"""

_base_ = ['../dyt/vitb_food101.py', '../_base_/methods/linear.py']

model = dict(backbone=_base_.method)
