"""Dynamic Tuning (DyT), a MoE-adapter as neck of a frozen ViT-B/16, Kinetics-400; no number in the paper.

python tools/train.py configs/dyt/vitb_moe_neck_k400.py
"""

_base_ = './vitb_k400.py'

model = dict(
    backbone=dict(adapter=None, dispatcher=None),
    neck=dict(adapter=dict(type='mmdyt.MoEAdapter', bottleneck=64, num_experts=4), routing='clip'))
