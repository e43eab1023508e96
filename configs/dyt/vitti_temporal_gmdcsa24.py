"""Dynamic Tuning (DyT) that knows the order of the frames, ViT-Ti/16, GMDCSA-24; no number in the paper.

python tools/train.py configs/dyt/vitti_temporal_gmdcsa24.py --amp
"""

_base_ = './vitti_gmdcsa24.py'

model = dict(neck=dict(aggregator=dict(temporal_positions=_base_.clip_len)))
