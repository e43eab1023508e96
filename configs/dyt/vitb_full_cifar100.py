"""Dynamic Tuning (DyT), all is tuned (Dynamic-Full), CIFAR-100; arXiv 2403.11808, image classification table: 83.43.

python tools/train.py configs/dyt/vitb_full_cifar100.py
"""

_base_ = './vitb_cifar100.py'

# paper silent: whether Dynamic-Full has adapters. They are kept.
model = dict(backbone=dict(tuned='all'))
optim_wrapper = dict(optimizer=dict(lr=_base_.optim_wrapper.optimizer.lr / 10))
