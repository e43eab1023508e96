"""Dynamic Tuning (DyT), dispatchers fitted to evidence, ViT-B/16 IN-21k on CIFAR-100; no number in the paper.

Not measured.

python tools/train.py configs/dyt/vitb_evidence_cifar100.py
"""

_base_ = './vitb_cifar100.py'

model = dict(
    rate_weight=0.0,
    complete_weight=0.0,
    distill_weight=0.0,
    backbone=dict(dispatcher=dict(noise=False), tuned=('adapter', )))

custom_hooks = [
    *_base_.custom_hooks,
    dict(type='mmdyt.EvidenceHook', begin=0.15, end=0.5),
    dict(type='mmdyt.CalibrationHook', rule='global'),
]
