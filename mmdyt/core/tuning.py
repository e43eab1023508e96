"""What is frozen, what is tuned, and what merges: one rule for each, and a count."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import torch.nn as nn

from .part import parts
from .rewriting import Rewritable

Tuned = Sequence[str] | Literal['all']
PARTS = 'parts'  # in a list of patterns: what the parts declare


def set_tuned(module: nn.Module, tuned: Tuned | None = None) -> None:
    """Freeze every parameter of ``module`` but those that are to be tuned.

    Args:
        module: Usually a backbone.
        tuned: None is what the parts of the module declare; ``'all'`` tunes everything; otherwise regular expressions
            searched in the parameter names, e.g. ``('adapter', 'dispatcher')``, among them ``'parts'`` for what the
            parts declare. An empty sequence freezes everything.

    Raises:
        ValueError: If a pattern matches no parameter.
    """
    if isinstance(tuned, str) and tuned != 'all':
        raise ValueError(f"tuned must be 'all' or a list of patterns, got {tuned!r}. Write [{tuned!r}].")
    if not (tuned is None or isinstance(tuned, str | Iterable)):
        raise ValueError(f"tuned must be 'all' or a list of patterns, got {tuned!r}.")
    patterns = [PARTS] if tuned is None else [''] if tuned == 'all' else list(tuned)
    names = [name for name, _ in module.named_parameters()]
    for pattern in patterns:
        if pattern != PARTS and not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f'tuned must hold patterns that match parameter names, got {pattern!r} which matches none of '
                f'{len(names)}, e.g. {names[-1]!r}.'
            )
    declared = {id(p) for part in parts(module) for p in part.tuned_parameters()} if PARTS in patterns else set()
    patterns = [pattern for pattern in patterns if pattern != PARTS]
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(id(parameter) in declared or any(re.search(p, name) for p in patterns))


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Count parameters: ``tuned``, ``frozen``, and those of each kind of part by its word.

    ``adapter`` and ``dispatcher`` are always there, 0 where there are none.
    """
    counts = Counter(tuned=0, frozen=0, adapter=0, dispatcher=0)
    for parameter in model.parameters():
        counts['tuned' if parameter.requires_grad else 'frozen'] += parameter.numel()
    for part in parts(model):
        counts[part.word] += sum(parameter.numel() for parameter in part.parameters())
    return dict(counts)


def count_tuned_parts(model: nn.Module) -> dict[str, int]:
    """Count the tuned parameters of each kind of part by its word; ``adapter`` and ``dispatcher`` are always there."""
    counts = Counter(adapter=0, dispatcher=0)
    for part in parts(model):
        counts[part.word] += sum(parameter.numel() for parameter in part.parameters() if parameter.requires_grad)
    return dict(counts)


def merge(model: nn.Module) -> list[str]:
    """Fold every rewrite that has a merged form into the frozen weights, which then do the same for less.

    Args:
        model: Changed in place. Deltas, token operations and dispatchers stay as they are.

    Returns:
        Names of the frozen modules whose rewrites have no merged form, and stay.
    """
    owners = [(name, module) for name, module in model.named_modules() if isinstance(module, Rewritable)]
    return [f'{owner}.{name}'.lstrip('.') for owner, module in owners for name in module.merge()]
