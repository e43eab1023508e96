"""Linear probe, ViT-B/16 IN-21k on SVHN; arXiv 2403.11808, image classification table: 56.29.

python tools/train.py configs/baselines/vitb_linear_svhn.py
"""

_base_ = ['../dyt/vitb_svhn.py', '../_base_/methods/linear.py']

model = dict(backbone=_base_.method)
