# ViT-B/16 with Dynamic Tuning and Segmenter's mask transformer of two layers (arXiv 2105.05633).
_base_ = './dyt_linear_vitb.py'

model = dict(
    decode_head=dict(
        _delete_=True,
        type='SegmenterMaskTransformerHead',
        in_channels=768,
        channels=768,
        embed_dims=768,
        num_layers=2,
        num_heads=12,
        drop_path_rate=0.0,  # these three as Segmenter published them; mmseg has 0.1, 0, 0
        drop_rate=0.1,
        attn_drop_rate=0.1,
        dropout_ratio=0.0,
        num_classes=150,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)))
