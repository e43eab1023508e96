"""How a branch runs on a mask. Each executor adds the branch's update of the active tokens to ``out``.

``branch`` maps (B, N, C) tokens to their (B, N, C) update and may mix nothing across tokens (an MLP, with its norm).
"""

from collections.abc import Callable

from torch import Tensor

Branch = Callable[[Tensor], Tensor]


def masked(branch: Branch, x: Tensor, out: Tensor, mask: Tensor) -> Tensor:
    """Run the branch on every token and multiply by the mask, eq. (5). Differentiable; saves nothing.

    Args:
        branch: The heavy branch.
        x: Its input, (B, N, C).
        out: What the update is added to, (B, N, C).
        mask: (B, N, 1), 0 or 1.

    Returns:
        (B, N, C).
    """
    return out + mask.to(out.dtype) * branch(x)  # eq. (6)


def packed(branch: Branch, x: Tensor, out: Tensor, mask: Tensor) -> Tensor:
    """Gather the active tokens of all images into one row, run the branch on these only, scatter back.

    Images of a batch may differ in their number of active tokens: nothing is padded. Writes into ``out`` in place,
    hence for inference only.

    Args:
        branch: The heavy branch; must treat every token on its own.
        x: Its input, (B, N, C).
        out: What the update is added to, (B, N, C); may be overwritten.
        mask: (B, N, 1), 0 or 1.

    Returns:
        (B, N, C).
    """
    active = mask.flatten().nonzero().squeeze(1)  # (K,)
    if active.numel() == 0:
        return out
    update = branch(x.flatten(0, 1).index_select(0, active).unsqueeze(0)).squeeze(0)  # (K, C)
    # a model without prefix tokens hands over transposed tokens: flatten would copy those, and the writes be lost
    rows = out.contiguous().flatten(0, 1)
    return rows.index_add_(0, active, update.to(out.dtype)).view(x.shape)  # eq. (6), active rows only


EXECUTORS: dict[str, Callable[[Branch, Tensor, Tensor, Tensor], Tensor]] = {'masked': masked, 'packed': packed}
