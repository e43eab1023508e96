"""Full tuning, ViT-B/16, UPerNet on ADE20K 512 x 512; arXiv 2403.11808, segmentation table: 47.66 mIoU.

python tools/train.py configs/baselines/upernet_vitb_full_ade20k.py
"""

_base_ = ['../dyt/upernet_vitb_ade20k.py', '../_base_/methods/full.py']

model = dict(backbone=_base_.method)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
