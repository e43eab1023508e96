"""Dynamic Tuning (DyT), dispatchers fitted to evidence, ViT-B/16 IN-21k, UPerNet on ADE20K; no number in the paper.

Not measured.

python tools/train.py configs/dyt/upernet_vitb_evidence_ade20k.py
"""

_base_ = ['./upernet_vitb_ade20k.py', '../_base_/schedules/evidence.py']

model = _base_.evidence_model
custom_hooks = [
    *_base_.custom_hooks,
    # the heads, drawn at random, learn first
    dict(_base_.evidence_hooks[0], begin=0.3, end=0.6, feature_weight=0.0),
    _base_.evidence_hooks[1],
]
