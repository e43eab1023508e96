# SVHN: 73257 / 26032 digits of 32 x 32 in train_32x32.mat and test_32x32.mat; without the extra images.
_base_ = './image_sets_224.py'

num_classes = 10
dataset = dict(type='mmdyt.SVHN', data_root='{{$MMDYT_DATA:data}}/cls/svhn')
train_dataloader = dict(dataset=dict(split='train', pipeline=_base_.array_train_pipeline, **dataset))
val_dataloader = dict(dataset=dict(split='test', pipeline=_base_.array_test_pipeline, **dataset))
test_dataloader = val_dataloader
