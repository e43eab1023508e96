"""Which tokens ran below each level of features, laid out as the level is.

B images, L levels, M patch tokens on a grid of h x w cells.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .dispatch import Dispatch
from .grid import on_grid, overlaps


def level_masks(
    decided: Mapping[str, Dispatch], levels: Sequence[int], features: Tensor, padded: float = 0.0
) -> tuple[Tensor, ...]:
    """Share of the decisions since the level before that were for a token to run, for each level of a backbone.

    A level is made of what the blocks above the previous level and up to its own add to the tokens, so its mask is the
    mean over the dispatched branches of these blocks. Earlier blocks are in the mask of the level that they feed first:
    a token that was skipped there only is no poorer in what is new at this level. Where no branch of these blocks is
    dispatched every token ran, and the mask is 1. Prefix tokens and prompts are in no mask.

    Args:
        decided: What the branches decided in one pass, by module name: ``record.of_pass()`` of a
            :class:`~mmdyt.core.observe.DispatchRecord`.
        levels: Indices of the blocks that the levels are read behind, ``backbone.out_indices``, in any order.
        features: Map of any level (B, C, h, w), or of a clip (B, C, T, h, w): its shape and device are read only.
        padded: Value of cells that lie wholly in padding, in [0, 1].

    Returns:
        A mask (B, 1, h, w), or (B, 1, T, h, w), for each level, in [0, 1] and fp32. In training it has the
        straight-through gradient of the decisions; detach it for weights.

    Raises:
        ValueError: If the grid of ``features`` is not that of the tokens.
    """
    masks, first = [], 0
    for level in sorted(set(levels)):  # as backbones give them
        fed = [dispatch for name, dispatch in decided.items() if first <= block_of(name) <= level]
        masks.append(_share(fed, features, padded) if fed else _every_cell(features))
        first = level + 1
    return tuple(masks)


def block_of(name: str) -> int:
    """Index of the block that a branch belongs to, ``backbone.layers.3.dynamic.mlp`` -> 3."""
    return int(name.split('.')[-3])


def _share(dispatches: Sequence[Dispatch], features: Tensor, padded: float) -> Tensor:
    """Mean of some masks of one pass, shaped as one channel of the features."""
    share = on_grid(dispatches, tuple(features.shape[-2:])).float().mean(0)  # (B, h, w); clips: (B * T, h, w)
    padding = next((found for d in dispatches if (found := d.padded_patches()) is not None), None)
    if padding is not None:
        share = share.masked_fill(padding.view(share.shape), padded)
    return share.view(_one_channel(features))


def _every_cell(features: Tensor) -> Tensor:
    return torch.ones(_one_channel(features), device=features.device)


def _one_channel(features: Tensor) -> tuple[int, ...]:
    return (features.shape[0], 1, *features.shape[2:])


def resize_masks(masks: Tensor, factor: float) -> Tensor:
    """Masks on the grid that a neck resizes features to, each value the mean over the area that its cell covers.

    Upsampled by a whole factor that is the nearest cell. Downsampled it is the mean of the cells that pooling reads, on
    which bilinear sampling is centred: a strip at the end that makes no whole cell is dropped, as necks drop it.

    Args:
        masks: (B, 1, h, w) of any values.
        factor: Of the sides, > 0, such as 4, 2, 1, 0.5.

    Returns:
        (B, 1, floor(factor * h), floor(factor * w)).

    Raises:
        ValueError: If no cell would be left.
    """
    if factor == 1:
        return masks
    down, along = (_areas(side, factor) for side in masks.shape[-2:])
    if not (len(down) and len(along)):
        raise ValueError(f'factor must leave a cell of a grid of {tuple(masks.shape[-2:])}, got {factor}.')
    down, along = down.to(masks.device), along.to(masks.device)
    # in fp64, whose products autocast leaves alone
    return (down @ masks.double() @ along.T).to(masks.dtype)


def _areas(side: int, factor: float) -> Tensor:
    """(cells after, cells before): which share of a cell after resizing each one before makes."""
    after = torch.arange(int(side * factor), dtype=torch.float64)
    before = torch.arange(side, dtype=torch.float64)
    edges = torch.stack([after, after + 1], dim=1) / factor
    return overlaps(edges, torch.stack([before, before + 1], dim=1)) * factor


def inactive_weights(masks: Tensor, inactive_weight: float) -> Tensor:
    """Weight of each cell in a loss: 1 plus ``inactive_weight`` times its inactive share, their mean made 1.

    Args:
        masks: Active shares in [0, 1], of any shape; no gradient flows into them.
        inactive_weight: >= 0. A cell that skipped everything counts 1 + this as much as one that ran everything.
    """
    weights = 1 + inactive_weight * (1 - masks.detach())
    return weights / weights.mean()
