"""One decision for neighbouring tokens. B images, N tokens incl. P prefix tokens, a grid of M = rows x columns."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdyt.core.dispatch import BestTokens, Dispatch
from mmdyt.core.gate import gate_logits
from mmdyt.core.options import is_integer
from mmdyt.core.tokens import TokenState

from .dispatcher import TokenDispatcher


class CellDispatcher(TokenDispatcher):
    """The patch tokens of a cell share one decision: its logit is the mean of theirs.

    So maps have whole cells, for decoders that read them at a coarser stride; at the borders of a grid that is no
    multiple of the cell there are smaller ones. In clips a cell may last several frames.
    # differs from paper: opt-in.

    Args:
        dim: Token width C.
        num_prefix_tokens: As of :class:`~mmdyt.parts.dispatcher.TokenDispatcher`.
        cell: Rows and columns of a cell.
        frames: Frames of a clip that a cell lasts.
        **options: Other arguments of :class:`~mmdyt.parts.dispatcher.TokenDispatcher`.

    Shape:
        (B, N, C) -> :class:`Dispatch` with a mask of (B, N, 1); its logits are those of the cells.

    Raises:
        ValueError: If an argument is out of range, or there is no grid, or the frames of a clip are no multiple.
    """

    needs_grid = True

    def __init__(self, dim: int, num_prefix_tokens: int = 1, cell: Sequence[int] = (2, 2), frames: int = 1, **options):
        super().__init__(dim, num_prefix_tokens, **options)
        if not (isinstance(cell, Sequence) and len(cell) == 2 and all(is_integer(n) and n >= 1 for n in cell)):
            raise ValueError(f'cell must hold two positive numbers of tokens, got {cell!r}.')
        if not (is_integer(frames) and frames >= 1):
            raise ValueError(f'frames must be at least 1, got {frames!r}.')
        self.cell, self.frames = tuple(cell), frames

    def score(self, x: Tensor, state: TokenState | None = None) -> Tensor:
        """Logits of cells (B / frames, cells, 1) of patch tokens ``x`` (B, M, C)."""
        if not x.shape[1]:  # none is read any more
            return super().score(x, state)
        rows, columns = self._grid(x.shape[1], state)
        logits = gate_logits(self.gate, x).view(-1, self.frames, rows, columns).mean(1, keepdim=True)
        if state.padding is None:
            return self._means(logits)
        counts = (~state.padding).to(logits.dtype).view(-1, 1, rows, columns)  # images only: clips have no padding
        shares = self._means(counts)
        return self._means(logits * counts) / shares.where(shares > 0, 1.0)

    def _means(self, values: Tensor) -> Tensor:
        """Of each cell, (B, cells, 1); those at the border are of what there is of them."""
        cells = F.avg_pool2d(values, self.cell, ceil_mode=True, count_include_pad=False)
        return cells.flatten(1).unsqueeze(-1)

    def of_tokens(self, dispatch: Dispatch, tokens: int, state: TokenState | None) -> Dispatch:
        """The decision about cells for each of their tokens."""
        prefix = dispatch.num_prefix_tokens
        if tokens == prefix:
            return dispatch
        (rows, columns), (height, width) = self._grid(tokens - prefix, state), self.cell
        device = dispatch.logits.device
        across = -(-columns // width)  # cells
        down, along = torch.arange(rows, device=device), torch.arange(columns, device=device)
        cell_of = ((down // height)[:, None] * across + along // width).flatten()
        logits = self._of_frames(dispatch.logits[:, cell_of])
        if dispatch.active is None or rows % height or columns % width:  # cells at the border are smaller
            mask = self._of_frames(dispatch.patch_mask[:, cell_of])
            return Dispatch(F.pad(mask, (0, 0, prefix, 0), value=1.0), logits, prefix)
        cells = dispatch.order[:, prefix:] - prefix  # the best first, and so are their tokens
        corners = cells // across * height * columns + cells % across * width
        inside = (down[:height, None] * columns + along[:width]).flatten()
        order = (corners[..., None] + inside).flatten(1) + prefix
        order = torch.cat([dispatch.order[:, :prefix], order], dim=1)
        active = prefix + (dispatch.active - prefix) * height * width
        return BestTokens(self._of_frames(order), active, logits, prefix)

    def _of_frames(self, values: Tensor) -> Tensor:
        """Those of cells, for each frame that they last."""
        return values if self.frames == 1 else values.repeat_interleave(self.frames, dim=0)

    def _grid(self, patches: int, state: TokenState | None) -> tuple[int, int]:
        """Rows and columns of the patch tokens."""
        grid = None if state is None else state.grid
        if grid is None or grid[0] * grid[1] != patches:
            raise ValueError(f'grid must be that of the {patches} patch tokens for cells, got {grid}.')
        if state.frames % self.frames:
            raise ValueError(f'frames must divide the {state.frames} frames of a clip, got {self.frames}.')
        return grid

    def extra_repr(self) -> str:
        """Show the options in ``print(model)``."""
        return f'{super().extra_repr()}, cell={self.cell}, frames={self.frames}'
