# ViT-B/16 with Dynamic Tuning, frozen base, linear head on the class token (paper: image classification, 224 x 224).
model = dict(
    type='mmdyt.DyTImageClassifier',
    target_rate=0.5,
    rate_weight=2.0,
    complete_weight=1.0,
    distill_weight=1.0,
    data_preprocessor=dict(type='mmdyt.ImagePreprocessor', normalization='half'),
    backbone=dict(
        type='mmdyt.DyTVisionTransformer',
        arch='base',
        img_size=224,
        patch_size=16,
        dispatch='mlp',
        adapter=dict(type='mmdyt.Adapter', bottleneck=64, scale=0.1),
        dispatcher=dict(type='mmdyt.TokenDispatcher', tau=5.0),
        init_cfg=dict(
            type='Pretrained', checkpoint='pretrain/vit_base_patch16_224_in21k.pth', prefix='backbone.')),
    head=dict(
        type='VisionTransformerClsHead',
        num_classes=100,
        in_channels=768,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk=(1, )))
