# Clips named by lists of "path label", 8 frames of 224 x 224. The file of a data set states its class count, folders,
# lists and pipelines. MMDYT_VIDEO_READER=pyav reads with PyAV where decord has no wheel.
reader = '{{$MMDYT_VIDEO_READER:decord}}'
clip_len = 8
open_clip = [dict(type='mmdyt.OpenClip', reader=reader, min_frames=clip_len)]
decode_clip = [dict(type='mmdyt.DecodeClip')]
pack_clip = [dict(type='FormatShape', input_format='NCTHW'), dict(type='PackActionInputs')]
uniform_frames = [dict(type='UniformSample', clip_len=clip_len)]
uniform_test_frames = [dict(type='UniformSample', clip_len=clip_len, test_mode=True)]
rescaled_crop = [
    dict(type='RandomRescale', scale_range=(224, 256)),
    dict(type='RandomCrop', size=224),
    dict(type='Flip', flip_ratio=0.5),
]
centre_crop = [dict(type='Resize', scale=(-1, 224)), dict(type='CenterCrop', crop_size=224)]
three_crops = [dict(type='Resize', scale=(-1, 224)), dict(type='ThreeCrop', crop_size=224)]

loader = dict(num_workers=8, persistent_workers=True)
train_dataloader = dict(
    batch_size=128, sampler=dict(type='DefaultSampler', shuffle=True), dataset=dict(type='VideoDataset'), **loader)
val_dataloader = dict(
    batch_size=8,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='VideoDataset', test_mode=True),
    **loader)
test_dataloader = val_dataloader

val_evaluator = dict(type='AccMetric', metric_list=('top_k_accuracy', ))
test_evaluator = val_evaluator
