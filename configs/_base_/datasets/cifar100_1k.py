# CIFAR-100, 1000 training and 2000 test images, lists, pipeline and batch as VTAB-1K has them.
_base_ = './path_label_224.py'

data_root = '{{$MMDYT_DATA:data}}/cls/cifar100_vtab_style'
num_classes = 100
train_dataloader = dict(dataset=dict(data_root=data_root), num_workers=1)
val_dataloader = dict(dataset=dict(data_root=data_root), num_workers=1)
test_dataloader = val_dataloader
