"""Full fine-tuning, ViT-B/16 IN-21k on VTAB-1K; arXiv 2403.11808, VTAB table: 68.96.

python tools/train.py configs/baselines/vitb_full_vtab1k.py
"""

_base_ = ['../dyt/vitb_vtab1k.py', '../_base_/methods/full.py']

model = dict(backbone=_base_.method)
optim_wrapper = dict(optimizer=dict(lr=_base_.optim_wrapper.optimizer.lr / 10))
