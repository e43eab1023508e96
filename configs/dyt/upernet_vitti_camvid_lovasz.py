"""Dynamic Tuning (DyT), ViT-Ti/16, UPerNet on CamVid, second stage with the Lovasz loss; no number in the paper.

python tools/train.py configs/dyt/upernet_vitti_camvid.py --amp
python tools/train.py configs/dyt/upernet_vitti_camvid_lovasz.py --amp
"""

_base_ = './upernet_vitti_camvid.py'

load_from = 'work_dirs/upernet_vitti_camvid/iter_1200.pth'
cross_entropy = dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)
lovasz = dict(type='LovaszLoss', classes='present', reduction='none', loss_weight=1.0)  # every class counts alike
model = dict(decode_head=dict(loss_decode=[cross_entropy, lovasz]))

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=30, end=600),
]
train_cfg = dict(max_iters=600, val_interval=600)
default_hooks = dict(checkpoint=dict(interval=200))
