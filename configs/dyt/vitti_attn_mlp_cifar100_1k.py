"""Dynamic Tuning (DyT), attention-MLP dispatch at r = 0.7, ViT-Ti/16, 1000 images of CIFAR-100; no number in the paper.

python tools/train.py configs/dyt/vitti_attn_mlp_cifar100_1k.py --amp
"""

_base_ = './vitti_cifar100_1k.py'

model = dict(target_rate=0.7, backbone=dict(dispatch='attn_mlp'))
