"""Dynamic Tuning (DyT), attention-MLP dispatch at r = 0.7, CIFAR-100; arXiv 2403.11808, table of variants: 90.03.

python tools/train.py configs/dyt/vitb_attn_mlp_cifar100.py
"""

_base_ = './vitb_cifar100.py'

model = dict(target_rate=0.7, backbone=dict(dispatch='attn_mlp'))
