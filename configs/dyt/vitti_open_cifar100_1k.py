"""Dynamic Tuning (DyT) from open dispatchers, one forward pass a step, ViT-Ti/16, CIFAR-100; no number in the paper.

Without the complete model's losses a step costs about half; starting near the complete model makes up for them.
python tools/train.py configs/dyt/vitti_open_cifar100_1k.py --amp
"""

_base_ = './vitti_rate_only_cifar100_1k.py'

model = dict(backbone=dict(dispatcher=dict(initial_rate=0.95)))
