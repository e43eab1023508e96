"""Dynamic Tuning (DyT), ViT-B/16 IN-21k, linear head, ADE20K 512 x 512; no number in the paper.

Not measured. What it costs is in docs/heads.md.

python tools/convert_vit.py jx_vit_base_patch16_224_in21k.pth pretrain/vit_base_patch16_224_in21k.pth
python tools/train.py configs/dyt/linear_vitb_ade20k.py
"""

_base_ = [
    '../_base_/models/dyt_linear_vitb.py',
    '../_base_/datasets/ade20k_512.py',
    '../_base_/schedules/adamw_160k.py',
    '../_base_/runtime/mmseg.py',
]
