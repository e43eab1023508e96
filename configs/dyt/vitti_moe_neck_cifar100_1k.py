"""Dynamic Tuning (DyT), a MoE-adapter as neck of a frozen ViT-Ti/16, 1000 images of CIFAR-100; no number in the paper.

python tools/train.py configs/dyt/vitti_moe_neck_cifar100_1k.py --amp
"""

_base_ = './vitti_cifar100_1k.py'

model = dict(
    backbone=dict(adapter=None, dispatcher=None),
    neck=dict(
        type='mmdyt.MoEAdapterNeck',
        in_channels=192,
        adapter=dict(type='mmdyt.MoEAdapter', bottleneck=64, num_experts=4, scale=1.0)))
