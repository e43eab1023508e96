# Full image sets, 224 x 224 (paper): random resized crops and flips in training, the centre in tests; top-1 accuracy.
# The file of a data set states its class count, type, folder and splits, and its pipelines where it holds arrays.
train_crop = [
    dict(type='RandomResizedCrop', scale=224, backend='pillow', interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackInputs'),
]
test_crop = [
    dict(type='ResizeEdge', scale=256, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
from_file = [dict(type='LoadImageFromFile')]
from_rgb_array = [dict(type='NumpyToPIL'), dict(type='PILToNumpy', to_bgr=True)]  # files are read as BGR too
array_train_pipeline = from_rgb_array + train_crop
array_test_pipeline = from_rgb_array + test_crop

loader = dict(num_workers=8, persistent_workers=True)
train_dataloader = dict(
    batch_size=1024,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(pipeline=from_file + train_crop),
    **loader)
val_dataloader = dict(
    batch_size=256,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(pipeline=from_file + test_crop),
    **loader)
test_dataloader = val_dataloader

top1 = dict(type='Accuracy', topk=(1, ))
mean_per_class = dict(type='SingleLabelMetric', items=('recall', ), average='macro')  # recall: accuracy on a class
val_evaluator = [top1]
test_evaluator = val_evaluator
