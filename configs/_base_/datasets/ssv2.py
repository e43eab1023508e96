# Something-Something v2, videos and lists as mmaction2's preparation leaves them: 8 uniform frames, no flips, since
# left and right are classes; tests see 1 x 3 views.
_base_ = './clips_224.py'

num_classes = 174
data_root = '{{$MMDYT_DATA:data}}/sthv2'
augment = [
    dict(type='RandomResizedCrop', area_range=(0.08, 1.0)),
    dict(type='Resize', scale=(224, 224), keep_ratio=False),
    dict(type='mmdyt.ClipRandAugment', num_ops=4, magnitude=7),
]
train_pipeline = _base_.open_clip + _base_.uniform_frames + _base_.decode_clip + augment + _base_.pack_clip
test_pipeline = (
    _base_.open_clip + _base_.uniform_test_frames + _base_.decode_clip + _base_.three_crops + _base_.pack_clip)
train_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        ann_file='sthv2_train_list_videos.txt',
        data_prefix=dict(video='videos'),
        pipeline=train_pipeline))
val_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        ann_file='sthv2_val_list_videos.txt',
        data_prefix=dict(video='videos'),
        pipeline=test_pipeline))
test_dataloader = val_dataloader
