"""Parallel adapter (AdaptFormer), ViT-B/16 on FGVC-Aircraft; arXiv 2403.11808, image classification table: 78.23.

python tools/train.py configs/baselines/vitb_adapter_aircraft.py
"""

_base_ = ['../dyt/vitb_aircraft.py', '../_base_/methods/adapter.py']

model = dict(backbone=_base_.method)
