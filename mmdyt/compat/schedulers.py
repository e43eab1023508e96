"""The one scheduler of mmengine whose checkpoints cannot be loaded."""

import types
from functools import wraps

import torch


def repair_one_cycle(module: types.ModuleType) -> None:
    """Keep the annealing function of ``OneCycleLR`` out of checkpoints, which ``torch.load`` would refuse for it.

    Whoever resumes has built it from the config before.
    """
    scheduler = module.OneCycleParamScheduler
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.9)
    if any(map(callable, scheduler(optimizer, 'lr', eta_max=1.0, total_steps=2).state_dict().values())):
        scheduler.state_dict = _without_functions(scheduler.state_dict)


def _without_functions(state_dict):
    @wraps(state_dict)
    def without_functions(self) -> dict:
        return {name: value for name, value in state_dict(self).items() if not callable(value)}

    return without_functions
