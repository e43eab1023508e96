# Food-101: 75750 / 25250 images, as unpacked from food-101.tar.gz.
_base_ = './image_sets_224.py'

num_classes = 101
dataset = dict(type='Food101', data_root='{{$MMDYT_DATA:data}}/cls/food-101')
train_dataloader = dict(dataset=dict(split='train', **dataset))
val_dataloader = dict(dataset=dict(split='test', **dataset))
test_dataloader = val_dataloader
