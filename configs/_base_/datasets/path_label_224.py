# Images named by lists of "path label", enlarged to 224 x 224 without augmentation, as VTAB-1K wants it.
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(224, 224), backend='pillow', interpolation='bicubic'),
    dict(type='PackInputs'),
]
loader = dict(batch_size=64, num_workers=4, persistent_workers=True)
train_dataloader = dict(
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='CustomDataset', ann_file='train800val200.txt', pipeline=pipeline),
    **loader)
val_dataloader = dict(
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', ann_file='test.txt', pipeline=pipeline),
    **loader)
test_dataloader = val_dataloader

val_evaluator = dict(type='Accuracy', topk=(1, ))
test_evaluator = val_evaluator
