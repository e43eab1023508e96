"""Dynamic Tuning (DyT) with dispatchers fitted to evidence, ViT-Ti/16, UPerNet on CamVid; the result is in docs/rate.md.

Not in the paper.

python tools/train.py configs/dyt/upernet_vitti_evidence_camvid.py --amp
"""

_base_ = './upernet_vitti_camvid.py'

model = dict(rate_weight=0.0, backbone=dict(dispatcher=dict(noise=False), tuned=('adapter', )))

custom_hooks = [
    *_base_.custom_hooks,
    dict(type='mmdyt.EvidenceHook', begin=0.5, end=0.75),
    dict(type='mmdyt.CalibrationHook', rule='global'),
]
