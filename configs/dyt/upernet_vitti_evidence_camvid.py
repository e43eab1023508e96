"""Dynamic Tuning (DyT), dispatchers fitted to evidence, ViT-Ti/16, UPerNet on CamVid; no number in the paper.

The result is in docs/results/rate.md.

python tools/train.py configs/dyt/upernet_vitti_evidence_camvid.py --amp
"""

_base_ = ['./upernet_vitti_camvid.py', '../_base_/methods/evidence.py']

model = dict(backbone=_base_.method, **_base_.method_model)
custom_hooks = [
    *_base_.custom_hooks,
    # the heads, drawn at random, learn first
    dict(_base_.method_hooks[0], begin=0.3, end=0.6, feature_weight=0.0),
    _base_.method_hooks[1],
]
