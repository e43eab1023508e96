# ImageNet-1k, ILSVRC 2012: train/CLASS/*.JPEG and val/CLASS/*.JPEG, classes in the order of their names.
_base_ = './image_sets_224.py'

num_classes = 1000
dataset = dict(type='ImageNet', data_root='{{$MMDYT_DATA:data}}/cls/imagenet')
train_dataloader = dict(dataset=dict(split='train', **dataset))
val_dataloader = dict(dataset=dict(split='val', **dataset))
test_dataloader = val_dataloader
