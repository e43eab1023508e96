# AdamW 1e-3 for every 256 of 1024 images a step, 100 epochs: 20 of linear warm-up, then a cosine to zero.
# 1024 images on one GPU; on 8 GPUs: --cfg-options train_dataloader.batch_size=128
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3 * 1024 / 256, weight_decay=0.01))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=20, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=0.0, begin=20, end=100, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=100, val_interval=10)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(enable=False, base_batch_size=1024)
