"""Dynamic Tuning (DyT), ViT-Ti/16, Segmenter's mask transformer on CamVid; no number in the paper.

The result is in docs/heads.md.

python tools/convert_vit.py vit_tiny_patch16_224_augreg_in21k_ft_in1k.pth pretrain/vit_tiny_patch16_224.pth
python tools/train.py configs/dyt/segmenter_vitti_camvid.py --amp
"""

_base_ = [
    '../_base_/models/dyt_segmenter_vitb.py',
    '../_base_/datasets/camvid.py',
    '../_base_/schedules/adamw_1200.py',
    '../_base_/runtime/mmseg.py',
]

model = dict(
    data_preprocessor=dict(size=(320, 320)),
    backbone=dict(arch='deit-tiny', img_size=(320, 320), init_cfg=dict(checkpoint='pretrain/vit_tiny_patch16_224.pth')),
    decode_head=dict(
        in_channels=192,
        channels=192,
        embed_dims=192,
        num_heads=3,
        num_classes=11,
        sampler=dict(type='OHEMPixelSampler', thresh=0.7, min_kept=10000)),  # as upernet_vitti_camvid.py
    test_cfg=dict(_delete_=True, mode='whole'))

default_hooks = dict(checkpoint=dict(interval=400), logger=dict(interval=25))
