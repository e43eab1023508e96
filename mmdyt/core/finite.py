"""Which tensors of a model hold what is no number: NaN, or an infinity that means nothing."""

from collections.abc import Container, Iterable, Iterator, Mapping

import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase


def open_buffers(model: nn.Module) -> set[str]:
    """Names of the buffers in which minus infinity has a meaning: thresholds that let all through, attention masks."""
    modules = {name: module for name, module in model.named_modules() if not isinstance(module, _NormBase)}
    names = ((module, key) for module in modules for key, _ in modules[module].named_buffers(recurse=False))
    return {f'{module}.{key}'.lstrip('.') for module, key in names}


def not_finite(tensors: Iterable[tuple[str, Tensor]], may_be_open: Container[str] = ()) -> list[str]:
    """Names of the tensors that hold NaN or an infinity.

    Args:
        tensors: Pairs of name and tensor; integers are always finite.
        may_be_open: Names that may hold minus infinity; see :func:`open_buffers`.
    """
    return [name for name, tensor in tensors if not _is_finite(tensor, name in may_be_open)]


def _is_finite(tensor: Tensor, may_be_open: bool) -> bool:
    if not isinstance(tensor, Tensor):
        return True  # a state may hold more than tensors
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta or tensor.element_size() < 2:
        return True  # eight-bit floats know no isfinite
    tensor = tensor.detach()
    return bool(((tensor < float('inf')) if may_be_open else tensor.isfinite()).all())


def named_tensors(node, name: str = '') -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested dicts, lists and tuples, with their places."""
    if isinstance(node, Tensor):
        yield name, node
    elif isinstance(node, Mapping | list | tuple):
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from named_tensors(value, f'{name}.{key}'.lstrip('.'))
