"""Stage 1 of the demo: pre-train a small plain ViT to tell 20 kinds of pictures apart; no number in the paper.

python tools/demo.py, or on the data that it drew: python tools/train.py configs/demo/pretrain_shapes.py
"""

_base_ = [
    '../_base_/models/demo_vit.py',
    '../_base_/datasets/demo_shapes_cls.py',
    '../_base_/runtime/mmpretrain.py',
]

work_dir = '{{$MMDYT_DEMO:work_dirs/demo}}/pretrain'
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(
        num_classes=_base_.num_classes, mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], to_rgb=True),
    # the mean over all patch tokens is classified: each of them then learns to tell what is there
    backbone=dict(type='VisionTransformer', arch=_base_.arch, img_size=48, patch_size=8, out_type='avg_featmap'),
    head=dict(type='LinearClsHead', num_classes=_base_.num_classes, in_channels=_base_.arch.embed_dims))

optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', begin=1, end=4, eta_min=1e-5, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=4)
val_cfg = dict()
test_cfg = dict()
custom_hooks = [dict(type='mmdyt.ParameterReportHook'), dict(type='mmdyt.RNGStateHook')]  # no dispatchers to count
