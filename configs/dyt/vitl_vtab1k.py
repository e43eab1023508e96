"""Dynamic Tuning (DyT), ViT-L/16 IN-21k on VTAB-1K, r = 0.5; no number in the paper is known here.

python tools/convert_vit.py jx_vit_large_patch16_224_in21k.pth pretrain/vit_large_patch16_224_in21k.pth
python tools/train.py configs/dyt/vitl_vtab1k.py
"""

_base_ = './vitb_vtab1k.py'

model = dict(
    backbone=dict(arch='large', init_cfg=dict(checkpoint='pretrain/vit_large_patch16_224_in21k.pth')),
    head=dict(in_channels=1024))
