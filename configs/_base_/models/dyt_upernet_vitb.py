# ViT-B/16 with Dynamic Tuning, frozen base, simple feature pyramid and UPerNet (paper: 512 x 512, 768 channels).
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='mmdyt.DyTEncoderDecoder',
    target_rate=0.5,
    rate_weight=2.0,
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        size=(512, 512),
        mean=[127.5, 127.5, 127.5],
        std=[127.5, 127.5, 127.5],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255),
    backbone=dict(
        type='mmdyt.DyTVisionTransformer',
        arch='base',
        img_size=(512, 512),
        patch_size=16,
        out_indices=(3, 5, 7, 11),
        out_type='featmap',
        final_norm=False,  # it would normalise the last of the four levels only
        drop_path_rate=0.1,
        dispatch='mlp',
        adapter=dict(type='mmdyt.Adapter', bottleneck=64, scale=0.1),
        dispatcher=dict(type='mmdyt.TokenDispatcher', tau=5.0),
        init_cfg=dict(
            type='Pretrained', checkpoint='pretrain/vit_base_patch16_224_in21k.pth', prefix='backbone.')),
    neck=dict(type='Feature2Pyramid', embed_dim=768, rescales=[4, 2, 1, 0.5], norm_cfg=norm_cfg),
    decode_head=dict(
        type='UPerHead',
        in_channels=[768, 768, 768, 768],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=768,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=768,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4)),
    train_cfg=dict(),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)))
