"""Dynamic Tuning (DyT), active tokens drawn at random (table 7), VTAB-1K; no number in the paper is known here.

python tools/train.py configs/dyt/vitb_random_vtab1k.py
"""

_base_ = './vitb_vtab1k.py'

model = dict(
    backbone=dict(
        dispatcher=dict(_delete_=True, type='mmdyt.RandomDispatcher', rate=_base_.model.target_rate)))
