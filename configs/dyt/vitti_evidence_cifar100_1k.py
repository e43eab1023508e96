"""Dynamic Tuning (DyT), dispatchers fitted to evidence, ViT-Ti/16, 1000 images of CIFAR-100; no number in the paper.

The result is in docs/rate.md.

python tools/train.py configs/dyt/vitti_evidence_cifar100_1k.py --amp
"""

_base_ = './vitti_cifar100_1k.py'

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
