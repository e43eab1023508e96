"""Dynamic Tuning (DyT), context dispatch, fitted dispatchers, ViT-Ti/16, CIFAR-100 (1000); no number in the paper.

The result is in docs/results/context.md.

python tools/train.py configs/dyt/vitti_context_cifar100_1k.py --amp
"""

_base_ = ['./vitti_cifar100_1k.py', '../_base_/methods/context.py']

model = dict(backbone=dict(skip_unread=True, **_base_.method), **_base_.method_model)
custom_hooks = [*_base_.custom_hooks, *_base_.method_hooks]
