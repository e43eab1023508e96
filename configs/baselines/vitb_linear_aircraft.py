"""Linear probe, ViT-B/16 IN-21k on FGVC-Aircraft; arXiv 2403.11808, image classification table: 40.51.

python tools/train.py configs/baselines/vitb_linear_aircraft.py
"""

_base_ = ['../dyt/vitb_aircraft.py', '../_base_/methods/linear.py']

model = dict(backbone=_base_.method)
