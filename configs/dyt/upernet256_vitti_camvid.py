"""Dynamic Tuning (DyT), ViT-Ti/16, UPerNet of 256 channels on CamVid; no number in the paper.

Not measured. What it costs is in docs/heads.md.

python tools/train.py configs/dyt/upernet256_vitti_camvid.py --amp
"""

_base_ = './upernet_vitti_camvid.py'

model = dict(decode_head=dict(channels=256))
