"""A model at another degree of token merging, with its bridge; and what the file of a bridge holds."""

from typing import Any

import torch.nn as nn

from mmdyt.core.part import parts
from mmdyt.parts.token_compensator import TokenCompensator, check_degree
from mmdyt.parts.tome import ToMe


def set_degree(model: nn.Module, degree: int, tuned_at: int | None = None) -> None:
    """Let a model run at another degree: the pairs that each block merges, and the bridge there if it has one.

    Args:
        model: With a :class:`~mmdyt.parts.tome.ToMe` in its blocks; changed in place. A bridge that was merged stays
            what it is.
        degree: Pairs in each block, b.
        tuned_at: a, the degree at which the model was tuned; None leaves it.

    Raises:
        ValueError: If nothing merges, not at a constant degree, or a degree is none.
    """
    merging = [part for part in parts(model) if isinstance(part, ToMe)]
    bridges = compensators(model)
    if not merging:
        raise ValueError('model must have mmdyt.ToMe parts for a degree to be set, got none.')
    if tuned_at is not None and not bridges:
        raise ValueError(f'tuned_at must be None without a mmdyt.TokenCompensator, got {tuned_at!r}.')
    for name, value in (('degree', degree), ('tuned_at', tuned_at)) if bridges else ():
        if value is not None:
            check_degree(name, value)
    for part in merging:
        part.set_degree(degree)
    for part in bridges:
        part.set_degrees(part.tuned_at if tuned_at is None else tuned_at, degree)


def compensators(model: nn.Module) -> list[TokenCompensator]:
    """The bridge of a model: its parts, in network order."""
    return [part for part in parts(model) if isinstance(part, TokenCompensator)]


def bridge_state(model: nn.Module) -> dict[str, Any]:
    """What the file of a bridge holds: its tensors on the CPU by their place, and the rank, scale and widths."""
    bridges = compensators(model)
    tensors = {f'{p.place}.{name}': getattr(p, name).detach().cpu().clone() for p in bridges for name in ('down', 'up')}
    widths = sorted({(part.out_features, part.in_features) for part in bridges})
    options = dict(rank=bridges[0].rank, scale=bridges[0].scale, widths=widths)
    return dict(state_dict=tensors, bridge=options)
