# Stanford Cars: 8144 / 8041 images, in the folder car_ims, and cars_annos.mat.
_base_ = './image_sets_224.py'

num_classes = 196
dataset = dict(type='StanfordCars', data_root='{{$MMDYT_DATA:data}}/cls/stanford_cars')
train_dataloader = dict(dataset=dict(split='train', **dataset))
val_dataloader = dict(dataset=dict(split='test', **dataset))
test_dataloader = val_dataloader
