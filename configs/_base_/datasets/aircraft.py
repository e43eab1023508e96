# FGVC-Aircraft, 100 variants: 6667 / 3333 images, as unpacked from fgvc-aircraft-2013b.tar.gz.
_base_ = './image_sets_224.py'

num_classes = 100
dataset = dict(type='FGVCAircraft', data_root='{{$MMDYT_DATA:data}}/cls/fgvc-aircraft-2013b')
train_dataloader = dict(dataset=dict(split='trainval', **dataset))
val_dataloader = dict(dataset=dict(split='test', **dataset))
test_dataloader = val_dataloader

val_evaluator = [_base_.mean_per_class, _base_.top1]  # the paper's number is the first
test_evaluator = val_evaluator
