"""Dynamic Tuning (DyT), MoE-adapters of 4 experts, UPerNet on ADE20K; arXiv 2403.11808, segmentation table: 47.67 mIoU.

python tools/train.py configs/dyt/upernet_vitb_moe_ade20k.py
"""

_base_ = './upernet_vitb_ade20k.py'

model = dict(backbone=dict(adapter=dict(type='mmdyt.MoEAdapter', num_experts=4)))
