"""Models of shapes without values: built in no time, in no memory, to be counted."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode


class _SchedulesOnCPU(TorchFunctionMode):
    """Leaves ``torch.linspace`` on the CPU: constructors read their rates of drop path from it, one by one."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.linspace:
            kwargs = dict(device='cpu') | kwargs
        return function(*args, **kwargs)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Within the context, modules are built on the meta device, also those that read a schedule's values meanwhile.

    Under ``torch.device('meta')`` alone, these end with an error: most transformers of the host libraries do.
    """
    with torch.device('meta'), _SchedulesOnCPU():
        yield
