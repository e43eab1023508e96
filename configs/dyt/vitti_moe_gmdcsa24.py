"""Dynamic Tuning (DyT), MoE-adapters of 4 experts, ViT-Ti/16, GMDCSA-24; no number in the paper.

python tools/train.py configs/dyt/vitti_moe_gmdcsa24.py --amp
"""

_base_ = './vitti_gmdcsa24.py'

model = dict(backbone=dict(adapter=dict(type='mmdyt.MoEAdapter', num_experts=4)))
