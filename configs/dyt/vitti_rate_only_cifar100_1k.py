"""Dynamic Tuning (DyT) without the complete model's losses, ViT-Ti/16, CIFAR-100; no number in the paper.

python tools/train.py configs/dyt/vitti_rate_only_cifar100_1k.py --amp
"""

_base_ = './vitti_cifar100_1k.py'

model = dict(complete_weight=0.0, distill_weight=0.0)
