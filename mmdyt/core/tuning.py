"""What is frozen and what is tuned: one rule, and a count of both."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch.nn as nn

Tuned = Sequence[str] | Literal['all']


def set_tuned(module: nn.Module, tuned: Tuned) -> None:
    """Freeze every parameter of ``module`` but those whose name matches a pattern.

    Args:
        module: Usually a backbone.
        tuned: Regular expressions searched in the parameter names, e.g. ``('adapter', 'dispatcher')``;
            ``'all'`` tunes everything; an empty sequence freezes everything.

    Raises:
        ValueError: If a pattern matches no parameter.
    """
    if isinstance(tuned, str) and tuned != 'all':
        raise ValueError(f"tuned must be 'all' or a list of patterns, got {tuned!r}. Write [{tuned!r}].")
    patterns = [''] if tuned == 'all' else list(tuned)
    names = [name for name, _ in module.named_parameters()]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f'tuned must hold patterns that match parameter names, got {pattern!r} which matches none of '
                f'{len(names)}, e.g. {names[-1]!r}.'
            )
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(any(re.search(pattern, name) for pattern in patterns))


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Count parameters: ``tuned``, ``frozen``, and of each kind ``adapter``, ``dispatcher``.

    A parameter is an adapter's or a dispatcher's when that word is a part of its dotted name.
    """
    counts = Counter(tuned=0, frozen=0, adapter=0, dispatcher=0)
    for name, parameter in model.named_parameters():
        counts['tuned' if parameter.requires_grad else 'frozen'] += parameter.numel()
        for part in ('adapter', 'dispatcher'):
            counts[part] += parameter.numel() * (part in name.split('.'))
    return dict(counts)
