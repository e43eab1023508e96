"""Linear probe, ViT-B/16 IN-21k on Something-Something v2; arXiv 2403.11808, video table: 27.64.

Tuned are the aggregator and the linear head.
python tools/train.py configs/baselines/vitb_linear_ssv2.py
"""

_base_ = ['../dyt/vitb_ssv2.py', '../_base_/methods/linear.py']

model = dict(backbone=_base_.method)
