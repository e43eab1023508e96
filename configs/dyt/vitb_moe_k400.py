"""Dynamic Tuning (DyT), MoE-adapters of 4 experts, Kinetics-400; arXiv 2403.11808, video table: 75.43.

python tools/train.py configs/dyt/vitb_moe_k400.py
"""

_base_ = './vitb_k400.py'

model = dict(backbone=dict(adapter=dict(type='mmdyt.MoEAdapter', num_experts=4)))
