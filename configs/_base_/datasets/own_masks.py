# Images and masks. What says 'own.' is filled from the data and from the options in ``own``: docs/own_data.md.
own = dict(
    layout='masks',
    root=None,  # folder with images/{train,val}, masks/{train,val} and classes.txt
    val=None,  # or without val/: the share that is held out
    seed=0,  # of what is held out
    size=512,  # pixels of a window that the model sees, across and down
    flip=0.5,  # how often training mirrors an image
    ignore_zero=False)  # True: label 0 is nothing, and the first class is 1

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label='own.ignore_zero'),
    dict(type='RandomResize', scale='own.scale', ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size='own.square', cat_max_ratio=0.75),
    dict(type='RandomFlip', prob='own.flip'),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale='own.scale', keep_ratio=True),
    # the ground truth keeps its size: it is loaded after the resize
    dict(type='LoadAnnotations', reduce_zero_label='own.ignore_zero'),
    dict(type='PackSegInputs'),
]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale='own.scale', keep_ratio=True)],
            [dict(type='RandomFlip', prob=0., direction='horizontal'),
             dict(type='RandomFlip', prob=1., direction='horizontal')],
            [dict(type='LoadAnnotations', reduce_zero_label='own.ignore_zero')],
            [dict(type='PackSegInputs')],
        ]),
]
dataset = dict(
    type='mmdyt.Masks',
    data_root='own.root',
    metainfo=dict(classes='own.names', palette='own.palette'),
    reduce_zero_label='own.ignore_zero')
loader = dict(num_workers=2, persistent_workers=True)
train_dataloader = dict(
    batch_size=8,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        data_prefix=dict(img_path='own.train_images', seg_map_path='own.train_masks'),
        img_suffix='own.train_ending',
        seg_map_suffix='own.train_mask_ending',
        filter_cfg='own.train_part',
        pipeline=train_pipeline,
        **dataset),
    **loader)
val_dataloader = dict(
    batch_size=1,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        data_prefix=dict(img_path='own.val_images', seg_map_path='own.val_masks'),
        img_suffix='own.val_ending',
        seg_map_suffix='own.val_mask_ending',
        filter_cfg='own.val_part',
        pipeline=test_pipeline,
        **dataset),
    **loader)
test_dataloader = val_dataloader

val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
