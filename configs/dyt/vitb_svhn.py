"""Dynamic Tuning (DyT), ViT-B/16 IN-21k on SVHN; arXiv 2403.11808, image classification table: 97.08.

python tools/convert_vit.py jx_vit_base_patch16_224_in21k.pth pretrain/vit_base_patch16_224_in21k.pth
python tools/train.py configs/dyt/vitb_svhn.py
"""

_base_ = [
    '../_base_/models/dyt_vitb_cls.py',
    '../_base_/datasets/svhn.py',
    '../_base_/schedules/adamw_image_sets.py',
    '../_base_/runtime/mmpretrain.py',
]

model = dict(head=dict(num_classes=_base_.num_classes))
custom_imports = dict(imports=[*_base_.custom_imports.imports, 'mmdyt.datasets.svhn'])
