# VTAB-1K, 19 tasks from one file: VTAB_TASK picks one, VTAB_ROOT is their folder; tools/vtab.py runs them all.
# In <root>/<task>/ lie the lists, "path label" a line: train800, val200, train800val200, test (.txt).
_base_ = './path_label_224.py'

vtab_groups = dict(  # the number of classes of each task
    natural=dict(cifar=100, caltech101=102, dtd=47, oxford_flowers102=102, oxford_iiit_pet=37, svhn=10, sun397=397),
    specialized=dict(patch_camelyon=2, eurosat=10, resisc45=45, diabetic_retinopathy=5),
    structured=dict(
        clevr_count=8, clevr_dist=6, dmlab=6, kitti=4, dsprites_loc=16, dsprites_ori=16, smallnorb_azi=18,
        smallnorb_ele=9))
class_counts = {name: count for group in vtab_groups.values() for name, count in group.items()}
task = '{{$VTAB_TASK:cifar}}'
assert task in class_counts, f'VTAB_TASK must be one of {list(class_counts)}, got {task!r}.'
num_classes = class_counts[task]

data_root = '{{$VTAB_ROOT:data/vtab-1k}}/' + task
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
# accuracy on all 19 tasks; the full sets of Aircraft and Pets count per class
