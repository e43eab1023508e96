"""Which tokens lie wholly in padding: they are never dispatched, and count in no rate and no cost.

A host pads smaller images of a batch, and crops at a border, to one size. It knows where; its backbone sees pixels
only. So the host says what its passes show, for as long as they run. B rows of a pass, M patch tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from .grid import View

# rows of the next pass -> what each shows, or None where nobody knows
Views = Callable[[int], Sequence[View] | None]

VIEWS: ContextVar[Views | None] = ContextVar('mmdyt_views', default=None)


@contextmanager
def showing(views: Views | None) -> Iterator[None]:
    """Within the context, and in this thread only, ``views`` tells what the passes of a backbone show."""
    token = VIEWS.set(views)
    try:
        yield
    finally:
        VIEWS.reset(token)


def padding_of(rows: int, grid: tuple[int, int], device: torch.device) -> Tensor | None:
    """Which patch tokens of the next pass lie wholly in padding.

    Args:
        rows: B.
        grid: Rows and columns of the patch tokens.
        device: Where it is wanted.

    Returns:
        (B, M) bool; None where there are none, or nobody knows.
    """
    views = VIEWS.get()
    found = None if views is None else views(rows)
    if found is None:
        return None
    empty = torch.stack([_empty(view, grid) for view in found])
    return empty.to(device) if empty.any() else None


def _empty(view: View, grid: tuple[int, int]) -> Tensor:
    """(M,): which cells show nothing of the image."""
    down, along = (edges[:, 1] <= edges[:, 0] for edges in view.edges(grid))
    return (down[:, None] | along).flatten()
