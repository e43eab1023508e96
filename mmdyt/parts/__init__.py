"""One method a file, on torch alone. Every part that is defined here is registered as ``mmdyt.<Class>``."""

import pkgutil
from importlib import import_module

from mmdyt.core.part import Part


def classes() -> dict[str, type[Part]]:
    """Every part by the name of its class: a new method is a file here, and nothing else."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = import_module(f'{__name__}.{info.name}')
        for one in vars(module).values():
            if isinstance(one, type) and issubclass(one, Part) and one.__module__ == module.__name__:
                found[one.__name__] = one
    return found
