"""Dynamic Tuning (DyT), ViT-Ti/16, clips of your own (docs/own_data.md); no number in the paper.

python tools/convert_vit.py vit_tiny_patch16_224_augreg_in21k_ft_in1k.pth pretrain/vit_tiny_patch16_224.pth
python tools/train.py configs/own/video.py --cfg-options own.root=FOLDER
"""

_base_ = [
    '../_base_/models/dyt_vitb_video.py',
    '../_base_/datasets/own_clips.py',
    '../_base_/schedules/adamw_own.py',
    '../_base_/runtime/mmaction.py',
]

custom_imports = dict(imports=[
    'mmdyt.models.recognizer', 'mmdyt.datasets.clips', 'mmdyt.datasets.clip_augment', 'mmdyt.datasets.clip_folders',
    'mmdyt.engine'])
model = dict(
    backbone=dict(
        arch='deit-tiny', img_size='own.size', init_cfg=dict(checkpoint='pretrain/vit_tiny_patch16_224.pth')),
    neck=dict(in_channels='own.width', aggregator=dict(num_heads='own.heads')),
    cls_head=dict(num_classes='own.classes', in_channels='own.width', topk=(1, )))
