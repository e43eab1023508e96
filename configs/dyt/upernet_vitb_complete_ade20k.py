"""Dynamic Tuning (DyT) with the complete model's losses per pixel, UPerNet on ADE20K; no number in the paper.

python tools/train.py configs/dyt/upernet_vitb_complete_ade20k.py
"""

_base_ = './upernet_vitb_ade20k.py'

model = dict(complete_weight=1.0, distill_weight=1.0)
