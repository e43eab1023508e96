"""Dynamic Tuning (DyT) of all parameters (Dynamic-Full), UPerNet, ADE20K; arXiv 2403.11808, segmentation table: 45.74.

python tools/train.py configs/dyt/upernet_vitb_full_ade20k.py
"""

_base_ = './upernet_vitb_ade20k.py'

model = dict(backbone=dict(tuned='all'))  # paper silent: whether it has adapters; they are kept
optim_wrapper = dict(optimizer=dict(lr=1e-4))  # a tenth, as the paper's full tuning
