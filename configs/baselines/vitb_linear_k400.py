"""Linear probe, ViT-B/16 IN-21k on Kinetics-400; arXiv 2403.11808, video table: 69.04.

Tuned are the aggregator and the linear head.
python tools/train.py configs/baselines/vitb_linear_k400.py
"""

_base_ = ['../dyt/vitb_k400.py', '../_base_/methods/linear.py']

model = dict(backbone=_base_.method)
