"""Dynamic Tuning (DyT), dispatchers fitted to evidence, ViT-B/16 IN-21k on Kinetics-400; no number in the paper.

Not measured.

python tools/train.py configs/dyt/vitb_evidence_k400.py
"""

_base_ = ['./vitb_k400.py', '../_base_/methods/evidence.py']

model = dict(backbone=_base_.method, **_base_.method_model)
custom_hooks = [*_base_.custom_hooks, *_base_.method_hooks]
