"""Linear probe, ViT-Ti/16, GMDCSA-24; no number in the paper, see docs/results.md.

python tools/train.py configs/baselines/vitti_linear_gmdcsa24.py --amp
"""

_base_ = '../dyt/vitti_gmdcsa24.py'

model = dict(backbone=dict(adapter=None, dispatcher=None))
