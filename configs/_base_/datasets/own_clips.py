# Clips in class folders or lists. What says 'own.' is filled from the data and from the options in ``own``:
# docs/own_data.md.
_base_ = './clips_224.py'

own = dict(
    layout='clips',
    root=None,  # folder with train/CLASS/CLIP and val/CLASS/CLIP; or with train.txt, val.txt and classes.txt
    val=None,  # or without val/ or val.txt: the share that is held out
    seed=0,  # of what is held out
    size=224,  # pixels that the model sees, across and down
    frames=8,  # of a clip that the model sees
    flip=0.5)  # how often training mirrors a clip

open_clip = [dict(type='mmdyt.OpenClip', reader=_base_.reader, min_frames='own.frames')]
train_pipeline = open_clip + [
    dict(type='UniformSample', clip_len='own.frames'),
    dict(type='mmdyt.DecodeClip'),
    dict(type='RandomRescale', scale_range='own.scales'),
    dict(type='RandomCrop', size='own.size'),
    dict(type='Flip', flip_ratio='own.flip'),
] + _base_.pack_clip
test_pipeline = open_clip + [
    dict(type='UniformSample', clip_len='own.frames', test_mode=True),
    dict(type='mmdyt.DecodeClip'),
    dict(type='Resize', scale='own.short'),
    dict(type='CenterCrop', crop_size='own.size'),
] + _base_.pack_clip
dataset = dict(type='own.dataset', data_root='own.root', metainfo=dict(classes='own.names'))
train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    dataset=dict(
        _delete_=True,
        ann_file='own.train_list',
        data_prefix=dict(video='own.train'),
        filter_cfg='own.train_part',
        pipeline=train_pipeline,
        **dataset))
val_dataloader = dict(
    batch_size=4,
    num_workers=2,
    dataset=dict(
        _delete_=True,
        ann_file='own.val_list',
        data_prefix=dict(video='own.val'),
        filter_cfg='own.val_part',
        pipeline=test_pipeline,
        test_mode=True,
        **dataset))
test_dataloader = val_dataloader

val_evaluator = dict(metric_options=dict(top_k_accuracy=dict(topk=(1, ))))
test_evaluator = val_evaluator
