# Kinetics-400, videos and lists as mmaction2's preparation leaves them: 8 frames of stride 16; tests see 3 x 1 views.
_base_ = './clips_224.py'

num_classes = 400
data_root = '{{$MMDYT_DATA:data}}/kinetics400'
sampling = dict(type='SampleFrames', clip_len=_base_.clip_len, frame_interval=16)
train_frames = [dict(num_clips=1, **sampling)]
test_frames = [dict(num_clips=3, test_mode=True, **sampling)]
train_pipeline = _base_.open_clip + train_frames + _base_.decode_clip + _base_.rescaled_crop + _base_.pack_clip
test_pipeline = _base_.open_clip + test_frames + _base_.decode_clip + _base_.centre_crop + _base_.pack_clip
train_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        ann_file='kinetics400_train_list_videos.txt',
        data_prefix=dict(video='videos_train'),
        pipeline=train_pipeline))
val_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        ann_file='kinetics400_val_list_videos.txt',
        data_prefix=dict(video='videos_val'),
        pipeline=test_pipeline))
test_dataloader = val_dataloader
