"""Dynamic Tuning (DyT), dispatchers fitted to evidence, ViT-B/16 IN-21k, UPerNet on ADE20K; no number in the paper.

Not measured.

python tools/train.py configs/dyt/upernet_vitb_evidence_ade20k.py
"""

_base_ = './upernet_vitb_ade20k.py'

model = dict(
    rate_weight=0.0,
    backbone=dict(dispatcher=dict(noise=False), tuned=('adapter', )))

custom_hooks = [
    *_base_.custom_hooks,
    dict(type='mmdyt.EvidenceHook', begin=0.3, end=0.6),
    dict(type='mmdyt.CalibrationHook', rule='global'),
]
