# Oxford-IIIT Pet, 37 breeds: 3680 / 3669 images, in the folders images and annotations.
_base_ = './image_sets_224.py'

num_classes = 37
dataset = dict(type='OxfordIIITPet', data_root='{{$MMDYT_DATA:data}}/cls/oxford-iiit-pet')
train_dataloader = dict(dataset=dict(split='trainval', **dataset))
val_dataloader = dict(dataset=dict(split='test', **dataset))
test_dataloader = val_dataloader

val_evaluator = [_base_.mean_per_class, _base_.top1]  # the paper's number is the first
test_evaluator = val_evaluator
