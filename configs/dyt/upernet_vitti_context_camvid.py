"""Dynamic Tuning (DyT), context dispatch, fitted dispatchers, ViT-Ti/16, UPerNet on CamVid; no number in the paper.

What context dispatch gave on CIFAR-100 is in docs/results/context.md.

python tools/train.py configs/dyt/upernet_vitti_context_camvid.py --amp
"""

_base_ = './upernet_vitti_evidence_camvid.py'

# with drop path the cheaper executors of training are out of reach
model = dict(backbone=dict(dispatch='layer', keys='all', drop_path_rate=0.0))
