"""Parallel adapter (AdaptFormer's form), ViT-Ti/16, UPerNet on CamVid; no number in the paper.

python tools/train.py configs/baselines/upernet_vitti_adapter_camvid.py --amp
"""

_base_ = '../dyt/upernet_vitti_camvid.py'

model = dict(backbone=dict(dispatcher=None))
