"""Full tuning, ViT-B/16 IN-21k on Food-101; arXiv 2403.11808, image classification table: 90.69.

python tools/train.py configs/baselines/vitb_full_food101.py
"""

_base_ = ['../dyt/vitb_food101.py', '../_base_/methods/full.py']

model = dict(backbone=_base_.method)
optim_wrapper = dict(optimizer=dict(lr=_base_.optim_wrapper.optimizer.lr / 10))
