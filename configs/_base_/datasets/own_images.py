# Images in class folders. What says 'own.' is filled from the data and from the options in ``own``: docs/own_data.md.
own = dict(
    layout='class_folders',
    root=None,  # folder with train/CLASS/IMAGE and val/CLASS/IMAGE
    val=None,  # or without val/: the share of train/ that is held out
    seed=0,  # of what is held out
    size=224,  # pixels that the model sees, across and down
    flip=0.5)  # how often training mirrors an image

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale='own.size', crop_ratio_range=(0.3, 1.0), backend='pillow',
         interpolation='bicubic'),
    dict(type='RandomFlip', prob='own.flip'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale='own.larger', edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size='own.size'),
    dict(type='PackInputs'),
]
dataset = dict(
    type='mmdyt.ClassFolders', data_root='own.root', extensions='own.endings', metainfo=dict(classes='own.names'))
loader = dict(batch_size=32, num_workers=2, persistent_workers=True)
train_dataloader = dict(
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(data_prefix='own.train', filter_cfg='own.train_part', pipeline=train_pipeline, **dataset),
    **loader)
val_dataloader = dict(
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(data_prefix='own.val', filter_cfg='own.val_part', pipeline=test_pipeline, **dataset),
    **loader)
test_dataloader = val_dataloader

val_evaluator = dict(type='Accuracy', topk=(1, ))
test_evaluator = val_evaluator
