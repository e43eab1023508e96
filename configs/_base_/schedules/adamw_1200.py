# adamw_160k.py in short, for a small data set: 100 steps of warm-up, 1200 in all.
_base_ = './adamw_160k.py'

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=100),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=100, end=1200),
]
train_cfg = dict(max_iters=1200, val_interval=1200)
