"""A-ViT with adapters on a frozen ViT-Ti/16, 1000 images of CIFAR-100; no number in the paper (arXiv 2112.07658).

python tools/train.py configs/avit/vitti_cifar100_1k.py --amp
"""

_base_ = ['../dyt/vitti_cifar100_1k.py', '../_base_/methods/avit.py']

model = dict(
    backbone=dict(dispatch='layer', dispatcher=dict(_delete_=True, **_base_.method_halt)),  # no option of another one
    **_base_.method_model,
)
