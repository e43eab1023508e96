"""Dynamic Tuning (DyT), MoE-adapters of 4 experts, ViT-Ti/16, 1000 images of CIFAR-100; no number in the paper.

python tools/train.py configs/dyt/vitti_moe_cifar100_1k.py --amp
"""

_base_ = './vitti_cifar100_1k.py'

model = dict(backbone=dict(adapter=dict(type='mmdyt.MoEAdapter', num_experts=4)))
