# The demo's video task, drawn by tools/demo_data.py: clips of 4 frames of 32 x 32, each of them read.
dataset_type = 'VideoDataset'
data_root = '{{$MMDYT_DEMO:work_dirs/demo}}/data/clips'
classes = ('right', 'left', 'down', 'up')
num_frames = 4

pipeline = [  # no flip: that would be another direction
    dict(type='mmdyt.OpenClip', reader='decord', min_frames=num_frames),
    # UniformSample of mmaction2 1.2.0 reads frame 2 of 4 twice and the last one never
    dict(type='SampleFrames', clip_len=num_frames, frame_interval=1, num_clips=1),
    dict(type='mmdyt.DecodeClip'),
    dict(type='FormatShape', input_format='NCTHW'),
    dict(type='PackActionInputs'),
]

train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='train.txt',
        data_prefix=dict(video='train'),
        metainfo=dict(classes=classes),
        pipeline=pipeline))
val_dataloader = dict(
    batch_size=50,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='val.txt',
        data_prefix=dict(video='val'),
        metainfo=dict(classes=classes),
        pipeline=pipeline,
        test_mode=True))
test_dataloader = val_dataloader

val_evaluator = dict(
    type='AccMetric', metric_list=('top_k_accuracy', ), metric_options=dict(top_k_accuracy=dict(topk=(1, ))))
test_evaluator = val_evaluator
