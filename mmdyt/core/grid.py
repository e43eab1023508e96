"""Where tokens are in the image: maps of decisions in the coordinates of the image, whatever view a pass saw of it.

B images, L dispatched branches, M patch tokens on a grid of rows x columns, T frames. A cell is what a patch token
covers. Shares are of areas, so windows, scales and flips need not fall on the cells of the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import Dispatch
from .options import check_choice

ROUNDING = 1e-9  # of a side: less in common is the error of a fraction
FLIPS = ('none', 'horizontal', 'vertical', 'diagonal')


@dataclass(frozen=True)
class View:
    """What a pass saw of an image: a window of the image, resized and flipped.

    Attributes:
        image: Height and width of the whole image as it was resized for this view, in pixels, without padding.
        patch: Height and width of a patch, in pixels of this view.
        top: First row of the window, in pixels of the resized and flipped image; negative where padding comes first.
        left: First column of the window.
        flip: How the image was flipped: ``'none'``, ``'horizontal'``, ``'vertical'`` or ``'diagonal'`` (both).

    Raises:
        ValueError: If a size is not positive, or the flip is unknown.
    """

    image: tuple[int, int]
    patch: tuple[int, int]
    top: int = 0
    left: int = 0
    flip: str = 'none'

    def __post_init__(self):
        check_choice(FLIPS, flip=self.flip)
        if min(*self.image, *self.patch) < 1:
            raise ValueError(f'image and patch must be positive, got {self.image} and {self.patch}.')

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of cells that cover the whole image; the last ones may reach beyond it."""
        return tuple(-(-side // patch) for side, patch in zip(self.image, self.patch, strict=True))

    def edges(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Where the cells of the window begin and end along the image, top to bottom and left to right.

        Args:
            grid: Rows and columns of the window's cells.

        Returns:
            (rows, 2) and (columns, 2), fractions of the image in [0, 1]; cells that lie wholly in padding are empty.
        """
        flipped = (self.flip in ('vertical', 'diagonal'), self.flip in ('horizontal', 'diagonal'))
        axes = zip(grid, self.image, self.patch, (self.top, self.left), flipped, strict=True)
        return tuple(_edges(*axis) for axis in axes)


def _edges(cells: int, side: int, patch: int, first: int, flipped: bool) -> Tensor:
    """(cells, 2): where each begins and ends, as fractions of a side."""
    ends = (first + patch * torch.arange(cells + 1, dtype=torch.float64)).clamp(0, side) / side
    edges = torch.stack([ends[:-1], ends[1:]], dim=1)
    return 1 - edges.flip(1) if flipped else edges


def overlaps(edges: Tensor, others: Tensor) -> Tensor:
    """How much of each other two sets of intervals (m, 2) and (n, 2) cover, (m, n)."""
    begin = torch.maximum(edges[:, None, 0], others[None, :, 0])
    end = torch.minimum(edges[:, None, 1], others[None, :, 1])
    width = end - begin
    return torch.where(width > ROUNDING, width, 0.0)


def windows(image: Sequence[int], crop: Sequence[int], stride: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """The windows of a sliding test, in mmsegmentation's order: row by row, the last ones moved back into the image.

    Args:
        image: Height and width, in pixels.
        crop: Height and width of a window, in pixels; larger than the image is as large as that.
        stride: How far windows are apart, down and to the right.

    Returns:
        Top, left, height and width of each; all are of one size.
    """
    height, width = (min(c, side) for c, side in zip(crop, image, strict=True))
    steps = [max(side - c + s - 1, 0) // s + 1 for side, c, s in zip(image, crop, stride, strict=True)]
    tops, lefts = (
        [max(min(i * s + c, side) - c, 0) for i in range(n)]
        for n, s, c, side in zip(steps, stride, crop, image, strict=True)
    )
    return [(top, left, height, width) for top in tops for left in lefts]


class DispatchMap:
    """Mean activation of each cell of an image over all that was seen of it; any windows, scales and flips.

    Args:
        image: Height and width of the image, in pixels.
        patch: Height and width of a cell of the map, in pixels of the image.
    """

    def __init__(self, image: tuple[int, int], patch: tuple[int, int]):
        self.view = View(tuple(image), tuple(patch))
        self._active: Tensor | float = 0.0
        self._seen: Tensor | float = 0.0

    def add(self, masks: Tensor, view: View) -> None:
        """Add what was decided in one view.

        Args:
            masks: (..., rows, columns) of 0 and 1, or any values; the same leading axes in each call. What is not
                finite counts as not seen.
            view: What of the image these cells are.
        """
        here = self.view.edges(self.view.cells)
        there = view.edges(tuple(masks.shape[-2:]))
        down, along = (overlaps(mine, theirs) for mine, theirs in zip(here, there, strict=True))
        masks, told = masks.to(torch.float64), masks.isfinite().to(torch.float64)
        self._active = self._active + down @ masks.nan_to_num(0.0, 0.0, 0.0) @ along.T
        self._seen = self._seen + down @ told @ along.T

    def mean(self) -> Tensor:
        """(..., rows, columns) in [0, 1]; NaN where nothing was seen."""
        if not isinstance(self._active, Tensor):
            raise ValueError('masks must be added before their mean is asked for, got none.')
        return torch.where(self._seen > 0, self._active / self._seen, torch.nan)


def agreement(masks: Tensor, view: View, others: Tensor, other: View) -> tuple[Tensor, float]:
    """On which share of what two views both show of an image they decide alike.

    Args:
        masks: (..., rows, columns) of 0 and 1.
        view: What of the image these cells are.
        others: Of the other view; its grid may differ.
        other: The other view, of the same image.

    Returns:
        The share of each leading index, NaN where the views have nothing in common, and the area in common as a
        fraction of the image.
    """
    edges = zip(view.edges(tuple(masks.shape[-2:])), other.edges(tuple(others.shape[-2:])), strict=True)
    down, along = (overlaps(mine, theirs) for mine, theirs in edges)
    masks, others = masks.to(torch.float64), others.to(torch.float64)
    both = (masks * (down @ others @ along.T)).sum(dim=(-2, -1))
    neither = ((1 - masks) * (down @ (1 - others) @ along.T)).sum(dim=(-2, -1))
    area = down.sum() * along.sum()
    return (both + neither) / area if area > 0 else torch.full(both.shape, torch.nan), float(area)


def neighbours_alike(masks: Tensor) -> Tensor:
    """Share of the pairs of cells beside and above each other that are decided alike, (..., rows, columns) -> (...)."""
    pairs = masks[..., 1:, :] == masks[..., :-1, :], masks[..., 1:] == masks[..., :-1]
    number = sum(pair.shape[-2] * pair.shape[-1] for pair in pairs)
    alike = sum(pair.sum(dim=(-2, -1)).to(torch.float64) for pair in pairs)
    return alike / number if number else torch.full(masks.shape[:-2], torch.nan)


def on_grid(dispatches: Sequence[Dispatch], grid: tuple[int, int]) -> Tensor:
    """Masks of one pass laid out on the image; a branch that saw no patch token, since none is read, has none active.

    Args:
        dispatches: What each of the L branches decided in one forward pass: ``record.flat()``.
        grid: Rows and columns of the patch tokens.

    Returns:
        (L, B, rows, columns), 0 or 1: whether the token ran that a patch is part of.

    Raises:
        ValueError: If there is no dispatch, or the grid has not one cell for each patch token.
    """
    if not dispatches:
        raise ValueError('dispatches must hold at least one dispatch, got none. Run the model within record_dispatch.')
    masks = [dispatch.on_patches(dispatch.patch_mask) for dispatch in dispatches]
    full = max(masks, key=lambda mask: mask.shape[1])
    masks = torch.stack([mask if mask.shape[1] else torch.zeros_like(full) for mask in masks])  # (L, B, M, 1)
    if masks.shape[2] != grid[0] * grid[1]:
        raise ValueError(f'grid must have one cell for each of {masks.shape[2]} patch tokens, got {tuple(grid)}.')
    return masks.reshape(*masks.shape[:2], *grid)


def active_share(dispatches: Sequence[Dispatch], grid: tuple[int, int]) -> Tensor:
    """Share of the dispatched branches in which each patch token was active, laid out on the image.

    Args:
        dispatches: As of :func:`on_grid`, which also tells what is refused.
        grid: Rows and columns of the patch tokens.

    Returns:
        (B, rows, columns), in [0, 1].
    """
    return on_grid(dispatches, grid).mean(0)
