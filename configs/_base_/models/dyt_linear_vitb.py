# ViT-B/16 with Dynamic Tuning and a linear layer per patch, resized to pixels (Segmenter-Linear, arXiv 2105.05633).
_base_ = './dyt_upernet_vitb.py'

model = dict(
    # one level is read, the last, and the pre-trained norm belongs to it: Segmenter applies it, too
    backbone=dict(out_indices=[11], final_norm=True),
    neck=None,
    decode_head=dict(
        _delete_=True,
        type='FCNHead',
        in_channels=768,
        channels=768,
        num_convs=0,  # nothing before the layer that classifies
        concat_input=False,
        dropout_ratio=0.0,
        num_classes=150,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    auxiliary_head=None)
