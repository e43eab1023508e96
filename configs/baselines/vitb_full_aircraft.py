"""Full tuning, ViT-B/16 IN-21k on FGVC-Aircraft; arXiv 2403.11808, image classification table: 80.53.

python tools/train.py configs/baselines/vitb_full_aircraft.py
"""

_base_ = ['../dyt/vitb_aircraft.py', '../_base_/methods/full.py']

model = dict(backbone=_base_.method)
optim_wrapper = dict(optimizer=dict(lr=_base_.optim_wrapper.optimizer.lr / 10))
