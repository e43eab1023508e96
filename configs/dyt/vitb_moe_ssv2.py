"""Dynamic Tuning (DyT), MoE-adapters of 4 experts, Something-Something v2; arXiv 2403.11808, video table: 46.56.

python tools/train.py configs/dyt/vitb_moe_ssv2.py
"""

_base_ = './vitb_ssv2.py'

model = dict(backbone=dict(adapter=dict(type='mmdyt.MoEAdapter', num_experts=4)))
