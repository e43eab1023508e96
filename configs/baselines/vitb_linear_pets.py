"""Linear probe, ViT-B/16 IN-21k on Oxford-IIIT Pet; arXiv 2403.11808, image classification table: 92.78.

python tools/train.py configs/baselines/vitb_linear_pets.py
"""

_base_ = ['../dyt/vitb_pets.py', '../_base_/methods/linear.py']

model = dict(backbone=_base_.method)
