# ViT-B/16 with Dynamic Tuning, frozen base, frame by frame; one learned query attends to all tokens of all frames, then
# a linear head; scores are averaged over views (paper: video, 8 frames of 224 x 224).
model = dict(
    type='mmdyt.DyTRecognizer',
    target_rate=0.5,
    rate_weight=2.0,
    complete_weight=1.0,
    distill_weight=1.0,
    data_preprocessor=dict(
        type='ActionDataPreprocessor',
        mean=[127.5, 127.5, 127.5],
        std=[127.5, 127.5, 127.5],
        format_shape='NCTHW'),
    backbone=dict(
        type='mmdyt.DyTVisionTransformer',
        arch='base',
        img_size=224,
        patch_size=16,
        out_type='raw',  # the aggregator reads every token
        dispatch='mlp',
        adapter=dict(type='mmdyt.Adapter', bottleneck=64, scale=0.1),
        dispatcher=dict(type='mmdyt.TokenDispatcher', tau=5.0),
        init_cfg=dict(
            type='Pretrained', checkpoint='pretrain/vit_base_patch16_224_in21k.pth', prefix='backbone.')),
    neck=dict(
        type='mmdyt.ClipNeck',
        in_channels=768,
        aggregator=dict(type='mmdyt.CrossAttentionAggregator', num_heads=12)),
    cls_head=dict(
        type='TimeSformerHead',
        num_classes=400,
        in_channels=768,
        loss_cls=dict(type='CrossEntropyLoss', loss_weight=1.0),
        average_clips='score'))
