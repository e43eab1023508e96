# CIFAR-100: 50000 / 10000 images of 32 x 32, downloaded where they are missing.
_base_ = './image_sets_224.py'

num_classes = 100
dataset = dict(type='CIFAR100', data_root='{{$MMDYT_DATA:data}}/cls/cifar100')
train_dataloader = dict(dataset=dict(split='train', pipeline=_base_.array_train_pipeline, **dataset))
val_dataloader = dict(dataset=dict(split='test', pipeline=_base_.array_test_pipeline, **dataset))
test_dataloader = val_dataloader
