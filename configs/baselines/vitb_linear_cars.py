"""Linear probe, ViT-B/16 IN-21k on Stanford Cars; arXiv 2403.11808, image classification table: 52.85.

python tools/train.py configs/baselines/vitb_linear_cars.py
"""

_base_ = ['../dyt/vitb_cars.py', '../_base_/methods/linear.py']

model = dict(backbone=_base_.method)
