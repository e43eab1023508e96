"""Dynamic Tuning (DyT), dispatchers fitted to evidence, ViT-Ti/16, UPerNet on CamVid; no number in the paper.

The result is in docs/rate.md.

python tools/train.py configs/dyt/upernet_vitti_evidence_camvid.py --amp
"""

_base_ = './upernet_vitti_camvid.py'

model = dict(
    rate_weight=0.0,
    backbone=dict(dispatcher=dict(noise=False), tuned=('adapter', )))

custom_hooks = [
    *_base_.custom_hooks,
    dict(type='mmdyt.EvidenceHook', begin=0.3, end=0.6),
    dict(type='mmdyt.CalibrationHook', rule='global'),
]
