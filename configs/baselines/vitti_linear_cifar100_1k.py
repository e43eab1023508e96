"""Linear probe, ViT-Ti/16, 1000 images of CIFAR-100; no number in the paper, the result is in docs/results.md.

python tools/train.py configs/baselines/vitti_linear_cifar100_1k.py --amp
"""

_base_ = '../dyt/vitti_cifar100_1k.py'

model = dict(backbone=dict(adapter=None, dispatcher=None))
