"""Where tokens are in the image. B images, N tokens incl. P prefix tokens, L dispatched branches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import Dispatch


def active_share(dispatches: Sequence[Dispatch], grid: tuple[int, int]) -> Tensor:
    """Share of the dispatched branches in which each patch token was active, laid out on the image.

    A branch that saw no patch token, since none of them is read after it, counts as one without active tokens.

    Args:
        dispatches: What each of the L branches decided in one forward pass: ``record.flat()``.
        grid: Rows and columns of the patch tokens.

    Returns:
        (B, rows, columns), in [0, 1].

    Raises:
        ValueError: If there is no dispatch, or the grid has not one cell for each patch token.
    """
    if not dispatches:
        raise ValueError('dispatches must hold at least one dispatch, got none. Run the model within record_dispatch.')
    masks = [dispatch.patch_mask for dispatch in dispatches]
    full = max(masks, key=lambda mask: mask.shape[1])
    masks = torch.stack([mask if mask.shape[1] else torch.zeros_like(full) for mask in masks])  # (L, B, N - P, 1)
    if masks.shape[2] != grid[0] * grid[1]:
        raise ValueError(f'grid must have one cell for each of {masks.shape[2]} patch tokens, got {tuple(grid)}.')
    return masks.mean(0).reshape(-1, *grid)
