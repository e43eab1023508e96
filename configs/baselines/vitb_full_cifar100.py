"""Full fine-tuning, ViT-B/16 IN-21k on CIFAR-100; arXiv 2403.11808, image classification table: 90.91.

python tools/train.py configs/baselines/vitb_full_cifar100.py
"""

_base_ = ['../dyt/vitb_cifar100.py', '../_base_/methods/full.py']

model = dict(backbone=_base_.method)
optim_wrapper = dict(optimizer=dict(lr=_base_.optim_wrapper.optimizer.lr / 10))
