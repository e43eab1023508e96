"""Full fine-tuning, ViT-B/16 IN-21k on Kinetics-400; arXiv 2403.11808, video table: 75.48.

python tools/train.py configs/baselines/vitb_full_k400.py
"""

_base_ = ['../dyt/vitb_k400.py', '../_base_/methods/full.py']

model = dict(backbone=_base_.method)
optim_wrapper = dict(optimizer=dict(lr=_base_.optim_wrapper.optimizer.lr / 10))
