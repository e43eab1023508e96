"""Dynamic Tuning (DyT), dispatchers fitted to evidence, ViT-Ti/16, 1000 images of CIFAR-100; no number in the paper.

The result is in docs/rate.md.

python tools/train.py configs/dyt/vitti_evidence_cifar100_1k.py --amp
"""

_base_ = ['./vitti_cifar100_1k.py', '../_base_/schedules/evidence.py']

model = _base_.evidence_model
custom_hooks = [*_base_.custom_hooks, *_base_.evidence_hooks]
