"""Dynamic Tuning (DyT), all is tuned (Dynamic-Full), Something-Something v2; arXiv 2403.11808, video table: 44.94.

python tools/train.py configs/dyt/vitb_full_ssv2.py
"""

_base_ = './vitb_ssv2.py'

# paper silent: whether Dynamic-Full has adapters. They are kept.
model = dict(backbone=dict(tuned='all'))
optim_wrapper = dict(optimizer=dict(lr=_base_.optim_wrapper.optimizer.lr / 10))
