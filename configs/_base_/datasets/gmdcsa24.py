# 56 short clips of acted falls and daily motions (GMDCSA-24), 39 / 17 of other persons, lists as Kinetics has them.
_base_ = './clips_224.py'

num_classes = 4
# the frames of these files have no times, by which decord would find them
open_clip = [dict(type='mmdyt.OpenClip', reader='pyav', min_frames=_base_.clip_len)]
data_root = '{{$MMDYT_DATA:data}}/video/gmdcsa24_segments'
train_pipeline = open_clip + _base_.uniform_frames + _base_.decode_clip + _base_.rescaled_crop + _base_.pack_clip
test_pipeline = open_clip + _base_.uniform_test_frames + _base_.decode_clip + _base_.three_crops + _base_.pack_clip
dataset = dict(data_root=data_root, data_prefix=dict(video='videos'))
train_dataloader = dict(
    batch_size=8, num_workers=1, dataset=dict(ann_file='train_video_list.txt', pipeline=train_pipeline, **dataset))
val_dataloader = dict(
    batch_size=2, num_workers=1, dataset=dict(ann_file='val_video_list.txt', pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader

val_evaluator = dict(metric_options=dict(top_k_accuracy=dict(topk=(1, ))))
test_evaluator = val_evaluator
