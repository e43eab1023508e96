"""Dynamic Tuning (DyT) that knows the order of the frames, Something-Something v2; no number in the paper.

python tools/train.py configs/dyt/vitb_temporal_ssv2.py
"""

_base_ = './vitb_ssv2.py'

model = dict(neck=dict(aggregator=dict(temporal_positions=_base_.clip_len)))
