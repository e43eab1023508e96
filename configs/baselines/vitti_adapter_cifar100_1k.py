"""Parallel adapter (AdaptFormer's form), ViT-Ti/16, 1000 images of CIFAR-100; no number in the paper.

python tools/train.py configs/baselines/vitti_adapter_cifar100_1k.py --amp
"""

_base_ = '../dyt/vitti_cifar100_1k.py'

model = dict(backbone=dict(dispatcher=None))
