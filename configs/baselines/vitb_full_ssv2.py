"""Full fine-tuning, ViT-B/16 IN-21k on Something-Something v2; arXiv 2403.11808, video table: 45.22.

python tools/train.py configs/baselines/vitb_full_ssv2.py
"""

_base_ = ['../dyt/vitb_ssv2.py', '../_base_/methods/full.py']

model = dict(backbone=_base_.method)
optim_wrapper = dict(optimizer=dict(lr=_base_.optim_wrapper.optimizer.lr / 10))
