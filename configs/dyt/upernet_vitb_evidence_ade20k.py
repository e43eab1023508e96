"""Dynamic Tuning (DyT), dispatchers fitted to evidence, ViT-B/16 IN-21k, UPerNet on ADE20K; no number in the paper.

Not measured.

python tools/train.py configs/dyt/upernet_vitb_evidence_ade20k.py
"""

_base_ = ['./upernet_vitb_ade20k.py', '../_base_/methods/evidence.py']

model = dict(backbone=_base_.method, **_base_.method_model)
custom_hooks = [
    *_base_.custom_hooks,
    # the heads, drawn at random, learn first
    dict(_base_.method_hooks[0], begin=0.3, end=0.6, feature_weight=0.0),
    _base_.method_hooks[1],
]
