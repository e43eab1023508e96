"""Dynamic Tuning (DyT), one decision per image (table 7), VTAB-1K; no number in the paper is known here.

python tools/train.py configs/dyt/vitb_sample_level_vtab1k.py
"""

_base_ = './vitb_vtab1k.py'

model = dict(backbone=dict(dispatcher=dict(type='mmdyt.SampleDispatcher')))
