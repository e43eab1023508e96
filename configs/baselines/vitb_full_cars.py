"""Full tuning, ViT-B/16 IN-21k on Stanford Cars; arXiv 2403.11808, image classification table: 88.71.

python tools/train.py configs/baselines/vitb_full_cars.py
"""

_base_ = ['../dyt/vitb_cars.py', '../_base_/methods/full.py']

model = dict(backbone=_base_.method)
optim_wrapper = dict(optimizer=dict(lr=_base_.optim_wrapper.optimizer.lr / 10))
