"""Stage 2 of the demo: Dynamic Tuning (DyT) of stage 1's frozen ViT to segment, light UPerNet; no number in the paper.

python tools/demo.py, or on the data that it drew, after stage 1: python tools/train.py configs/demo/dyt_shapes.py
"""

_base_ = [
    '../_base_/models/demo_vit.py',
    '../_base_/models/dyt_upernet_vitb.py',
    '../_base_/datasets/demo_shapes_seg.py',
    '../_base_/schedules/adamw_160k.py',
    '../_base_/runtime/mmseg.py',
]

work_dir = '{{$MMDYT_DEMO:work_dirs/demo}}/dyt'
base = dict(checkpoint='{{$MMDYT_DEMO:work_dirs/demo}}/pretrain/epoch_4.pth')
width, norm_cfg = _base_.arch.embed_dims, dict(type='BN', requires_grad=True)
head = dict(channels=64, num_classes=len(_base_.metainfo.classes), norm_cfg=norm_cfg)
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        arch=dict(_delete_=True, **_base_.arch), img_size=_base_.crop_size, patch_size=8, out_indices=(0, 1, 2, 5),
        drop_path_rate=0.0, adapter=dict(bottleneck=16), init_cfg=base),
    neck=dict(embed_dim=width, rescales=[2, 1, 0.5, 0.25], norm_cfg=norm_cfg),
    decode_head=dict(in_channels=[width] * 4, pool_scales=(1, 2), **head),
    auxiliary_head=dict(in_channels=width, **head),
    test_cfg=dict(_delete_=True, mode='whole'))

optim_wrapper = dict(optimizer=dict(lr=1e-2))  # high, since the run is short
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=20, end=240),
]
train_cfg = dict(max_iters=240, val_interval=240)
