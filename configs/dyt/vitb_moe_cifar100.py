"""Dynamic Tuning (DyT), MoE-adapters of 4 experts, CIFAR-100; arXiv 2403.11808, image classification table: 91.01.

python tools/train.py configs/dyt/vitb_moe_cifar100.py
"""

_base_ = './vitb_cifar100.py'

model = dict(backbone=dict(adapter=dict(type='mmdyt.MoEAdapter', num_experts=4)))
