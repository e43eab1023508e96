"""Dynamic Tuning (DyT), ViT-B/16 IN-21k, UPerNet on ADE20K 512 x 512; arXiv 2403.11808, segmentation table: 46.90 mIoU.

python tools/convert_vit.py jx_vit_base_patch16_224_in21k.pth pretrain/vit_base_patch16_224_in21k.pth
python tools/train.py configs/dyt/upernet_vitb_ade20k.py
"""

_base_ = [
    '../_base_/models/dyt_upernet_vitb.py',
    '../_base_/datasets/ade20k_512.py',
    '../_base_/schedules/adamw_160k.py',
    '../_base_/runtime/mmseg.py',
]
