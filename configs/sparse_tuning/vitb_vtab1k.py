"""Sparse-Tuning, ViT-B/16 IN-21k on VTAB-1K, k = 0.7; arXiv 2405.14700, no number known.

One task, named by VTAB_TASK, or all that are there by tools/vtab.py; the recipe is that of VTAB-1K.

python tools/train.py configs/sparse_tuning/vitb_vtab1k.py
"""

_base_ = ['../dyt/vitb_vtab1k.py', '../_base_/methods/sparse_tuning.py']

model = dict(backbone=_base_.method)
