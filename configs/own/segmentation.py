"""Dynamic Tuning (DyT), ViT-Ti/16, linear head, masks of your own (docs/own_data.md); no number in the paper.

python tools/convert_vit.py vit_tiny_patch16_224_augreg_in21k_ft_in1k.pth pretrain/vit_tiny_patch16_224.pth
python tools/train.py configs/own/segmentation.py --cfg-options own.root=FOLDER
"""

_base_ = [
    '../_base_/models/dyt_linear_vitb.py',
    '../_base_/datasets/own_masks.py',
    '../_base_/schedules/adamw_own_iters.py',
    '../_base_/runtime/mmseg.py',
]

custom_imports = dict(imports=['mmdyt.models.segmentor', 'mmdyt.datasets.masks', 'mmdyt.engine'])
model = dict(
    data_preprocessor=dict(size='own.square'),
    backbone=dict(
        arch='deit-tiny', img_size='own.square', out_indices=['own.last_layer'],
        init_cfg=dict(checkpoint='pretrain/vit_tiny_patch16_224.pth')),
    decode_head=dict(num_classes='own.classes', in_channels='own.width', channels='own.width'),
    test_cfg=dict(crop_size='own.square', stride='own.stride'))

default_hooks = dict(checkpoint=dict(interval=500))
