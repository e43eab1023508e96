"""Repair a module of a host at once if it is there, else as soon as somebody imports it."""

import sys
import types
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader

Repair = Callable[[types.ModuleType], None]


def repair_modules(repairs: dict[str, Repair]) -> None:
    """Apply repairs to modules of hosts, without importing any of them.

    Args:
        repairs: By module name; each is called with the executed module, and must do nothing to a module that needs no
            repair.
    """
    for name, repair in repairs.items():
        if name in sys.modules:
            repair(sys.modules[name])
    for finder in sys.meta_path:
        if isinstance(finder, _RepairingFinder):
            finder.repairs.update(repairs)
            return
    sys.meta_path.insert(0, _RepairingFinder(dict(repairs)))


def replace(package: str, name: str, new: Callable) -> None:
    """Put ``new`` wherever modules of a package that were imported already hold the object that it wraps.

    Args:
        package: Such as ``mmcv``.
        name: Of the object in these modules.
        new: With ``__wrapped__``.
    """
    for module_name, module in list(sys.modules.items()):
        if module_name.split('.')[0] == package and vars(module).get(name) is new.__wrapped__:
            setattr(module, name, new)


class _RepairingFinder(MetaPathFinder):
    """Finds the modules that have a repair, and leaves all others to the finders behind it."""

    def __init__(self, repairs: dict[str, Repair]):
        self.repairs = repairs

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        """The spec of a module whose repair follows its execution."""
        if fullname not in self.repairs:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _RepairingLoader(spec.loader.name, spec.loader.path, self.repairs[fullname])
        return spec


class _RepairingLoader(SourceFileLoader):
    """Executes a module, then repairs it."""

    def __init__(self, fullname: str, path: str, repair: Repair):
        super().__init__(fullname, path)
        self._repair = repair

    def exec_module(self, module: types.ModuleType) -> None:
        """Execute and repair."""
        super().exec_module(module)
        self._repair(module)
