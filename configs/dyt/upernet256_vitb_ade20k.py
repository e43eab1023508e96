"""Dynamic Tuning (DyT), ViT-B/16 IN-21k, UPerNet of 256 channels, ADE20K 512 x 512; no number in the paper.

Not measured. What it costs is in docs/heads.md.

python tools/train.py configs/dyt/upernet256_vitb_ade20k.py
"""

_base_ = './upernet_vitb_ade20k.py'

model = dict(decode_head=dict(channels=256))
