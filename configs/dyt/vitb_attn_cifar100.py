"""Dynamic Tuning (DyT), attention dispatch at r = 0.5, CIFAR-100; arXiv 2403.11808, table of variants: 84.58.

python tools/train.py configs/dyt/vitb_attn_cifar100.py
"""

_base_ = './vitb_cifar100.py'

model = dict(backbone=dict(dispatch='attn'))
