"""Dynamic Tuning (DyT), bottleneck d = 64, ViT-B/16 on VTAB-1K; no number in the paper is known here.

python tools/train.py configs/dyt/vitb_d64_vtab1k.py
Other widths: --cfg-options model.backbone.adapter.bottleneck=16
"""

_base_ = './vitb_vtab1k.py'

model = dict(backbone=dict(adapter=dict(bottleneck=64)))
