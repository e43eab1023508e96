"""Dynamic Tuning (DyT), ViT-B/16 IN-21k on VTAB-1K, r = 0.9; arXiv 2403.11808, VTAB table: 77.30.

python tools/train.py configs/dyt/vitb_r09_vtab1k.py
"""

_base_ = './vitb_vtab1k.py'

model = dict(target_rate=0.9)
