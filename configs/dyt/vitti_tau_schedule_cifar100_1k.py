"""Dynamic Tuning (DyT), temperature falling from 5 to 0.1, ViT-Ti/16, 1000 images of CIFAR-100; no number in the paper.

python tools/train.py configs/dyt/vitti_tau_schedule_cifar100_1k.py --amp
"""

_base_ = './vitti_cifar100_1k.py'

custom_hooks = [*_base_.custom_hooks, dict(type='mmdyt.TauScheduleHook', start=5.0, end=0.1, by='linear')]
