"""Dynamic Tuning (DyT), MoE-adapters as neck of a frozen ViT-B/16, UPerNet on ADE20K; no number in the paper.

python tools/train.py configs/dyt/upernet_vitb_moe_neck_ade20k.py
"""

_base_ = './upernet_vitb_ade20k.py'

model = dict(
    backbone=dict(adapter=None, dispatcher=None),
    neck=dict(
        _delete_=True,
        type='mmdyt.MoEAdapterNeck',
        in_channels=[768, 768, 768, 768],
        adapter=dict(type='mmdyt.MoEAdapter', bottleneck=64, num_experts=4, scale=0.1),
        rescales=[4, 2, 1, 0.5],
        norm_cfg=_base_.norm_cfg))
