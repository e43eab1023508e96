"""What is to be known of a library's Vision Transformer to adapt it."""

from dataclasses import dataclass

import torch.nn as nn

from .named import Names


@dataclass(frozen=True)
class Host:
    """A network, and where its layers are.

    Attributes:
        layers: The container of its layers, whose entries are replaced.
        names: Of the modules of a layer.
        patch: Its patch embedding, a convolution.
        prefix: Leading tokens that are no patches: CLS, registers, a distillation token.
        head: Pattern of the names of its classifiers' parameters, which are tuned beside the parts.
    """

    layers: nn.Sequential | nn.ModuleList
    names: Names
    patch: nn.Conv2d
    prefix: int
    head: str


def found_at(module: nn.Module, paths: tuple[str, ...]) -> object | None:
    """What is at the first of some paths that exists; None where there is nothing."""
    for path in paths:
        found = module
        for name in path.split('.'):
            found = getattr(found, name, None)
        if found is not None:
            return found
    return None
