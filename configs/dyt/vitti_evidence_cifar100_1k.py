"""Dynamic Tuning (DyT), dispatchers fitted to evidence, ViT-Ti/16, 1000 images of CIFAR-100; no number in the paper.

The result is in docs/results/rate.md.

python tools/train.py configs/dyt/vitti_evidence_cifar100_1k.py --amp
"""

_base_ = ['./vitti_cifar100_1k.py', '../_base_/methods/evidence.py']

model = dict(backbone=_base_.method, **_base_.method_model)
custom_hooks = [*_base_.custom_hooks, *_base_.method_hooks]
