"""A feature for every patch after tokens were merged or dropped. B images, n patches, K tokens left, C width.

What a step does not keep *leaves*: its cells have the value of that moment (``stale``), which a policy may amend.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .tokens import TokenState

NEIGHBOURS = 3

Policy = Callable[['TokenState', Tensor], Tensor]


def merge(state: 'TokenState', tokens: Tensor) -> Tensor:
    """Each cell has the value of the token that it became a part of: exact for merged tokens.

    Args:
        state: Of the pass; it knows the owner of each cell.
        tokens: (B, K, C), the patch tokens that are left.

    Returns:
        (B, n, C).
    """
    return of_cells(tokens, state.owner.clamp(min=0))


def stale(state: 'TokenState', tokens: Tensor) -> Tensor:
    """Cells that left keep the value with which they left. Arguments as of :func:`merge`."""
    if state.left is None:
        return merge(state, tokens)
    return torch.where(state.live.unsqueeze(-1), merge(state, tokens), state.left.to(tokens.dtype))


def stale_delta(state: 'TokenState', tokens: Tensor) -> Tensor:
    """The stale value, moved as the token that the cell became a part of moved since. Arguments as of :func:`merge`."""
    if state.left is None:
        return merge(state, tokens)
    now = merge(state, tokens)
    moved = state.left.to(tokens.dtype) + (now - state.joined.to(tokens.dtype))
    return torch.where(state.live.unsqueeze(-1), now, moved)


def knn(state: 'TokenState', tokens: Tensor) -> Tensor:
    """Cells that left have the mean of the nearest cells that did not, weighted by 1 / distance.

    Arguments as of :func:`merge`; the state must know the grid.
    """
    rows, columns = state.grid
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(tokens.device, torch.float32)
    far = torch.cdist(places, places).masked_fill(~state.live.unsqueeze(1), torch.inf)  # (B, n, n)
    near, index = far.topk(min(NEIGHBOURS, far.shape[-1]), dim=-1, largest=False)
    weights = 1 / near.clamp(min=1e-6)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)
    cells = merge(state, tokens)
    chosen = of_cells(cells, index.flatten(1)).unflatten(1, index.shape[1:])  # (B, n, neighbours, C)
    mean = (weights.to(tokens.dtype).unsqueeze(-1) * chosen).sum(2)
    return torch.where(state.live.unsqueeze(-1), cells, mean)


def of_cells(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens (B, K, C) at places (B, m) -> (B, m, C)."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))


RESTORE: dict[str, Policy] = {
    'stale': stale,
    'stale+delta': stale_delta,
    'stale+adapter': stale,
    'fused': merge,
    'knn': knn,
    'merge': merge,
}
KEEP_VALUES = ('stale', 'stale+delta', 'stale+adapter')  # with which cells leave
ADAPT = 'stale+adapter'  # and these go on through the adapters
NEED_OWNER = ('stale+delta', 'fused', 'merge')  # nothing may be dropped without a token that stands for it
WITHOUT_OWNER = "'stale', 'stale+adapter' or 'knn'"
