"""Dynamic Tuning (DyT), ViT-B/16 IN-21k on VTAB-1K, r = 0.5; arXiv 2403.11808, VTAB table: 77.14.

The number is the mean of three group means. One task, named by VTAB_TASK, or all that are there:
VTAB_TASK=dtd python tools/train.py configs/dyt/vitb_vtab1k.py
python tools/vtab.py configs/dyt/vitb_vtab1k.py --root data/vtab-1k
"""

_base_ = [
    '../_base_/models/dyt_vitb_cls.py',
    '../_base_/datasets/vtab1k.py',
    '../_base_/schedules/adamw_vtab1k.py',
    '../_base_/runtime/mmpretrain.py',
]

model = dict(
    backbone=dict(adapter=dict(bottleneck=8, scale=1.0)),
    head=dict(num_classes=_base_.num_classes))
default_hooks = dict(checkpoint=dict(interval=100))  # an epoch takes seconds: the last one is enough
