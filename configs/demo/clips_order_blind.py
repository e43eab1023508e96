"""Stage 3 of the demo: Dynamic Tuning (DyT) of stage 1's frozen ViT to tell where a shape moves, as the paper
aggregates frames: blind to their order, so that at most 50 % can be right; no number in the paper.

python tools/demo.py, or on what it drew, after stage 1: python tools/train.py configs/demo/clips_order_blind.py
"""

_base_ = [
    '../_base_/models/demo_vit.py',
    '../_base_/models/dyt_vitb_video.py',
    '../_base_/datasets/demo_clips.py',
    '../_base_/schedules/adamw_video.py',
    '../_base_/runtime/mmaction.py',
]

work_dir = '{{$MMDYT_DEMO:work_dirs/demo}}/clips_order_blind'
base = dict(checkpoint='{{$MMDYT_DEMO:work_dirs/demo}}/pretrain/epoch_4.pth')
width, heads = _base_.arch.embed_dims, _base_.arch.num_heads
model = dict(
    # stage 1 asked what is there, not where: here the position embeddings are tuned, too  # differs from paper
    backbone=dict(
        arch=dict(_delete_=True, **_base_.arch), img_size=32, patch_size=8, adapter=dict(bottleneck=16),
        tuned=['adapter', 'dispatcher', 'pos_embed'], init_cfg=base),
    neck=dict(
        in_channels=width, aggregator=dict(num_heads=heads),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.1)),  # high, as the rates, since the run is short
    cls_head=dict(num_classes=len(_base_.classes), in_channels=width, topk=(1, )))

positions = dict(lr_mult=10, decay_mult=0)
optim_wrapper = dict(
    optimizer=dict(lr=5e-3), paramwise_cfg=dict(custom_keys=dict(pos_embed=positions, temporal_positions=positions)))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=20, end=150),
]
train_cfg = dict(max_epochs=3, val_interval=3)
