"""How a branch runs on a mask. Each executor adds the branch's update of the active tokens to ``out``.

A branch maps tokens and their :class:`~mmdyt.core.attention.Layout` to an update of the same shape. A branch that mixes
tokens (attention, a whole layer) must look at the active ones only, and the layout says which these are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .attention import DENSE, Layout, check_tracing

Branch = Callable[[Tensor, Layout], Tensor]


def masked(branch: Branch, x: Tensor, out: Tensor, mask: Tensor) -> Tensor:
    """Run the branch on every token, inactive keys hidden, and multiply by the mask, eq. (5). Saves nothing.

    Args:
        branch: The heavy branch.
        x: Its input, (B, N, C).
        out: What the update is added to, (B, N, C).
        mask: (B, N, 1), 0 or 1.

    Returns:
        (B, N, C).
    """
    layout = Layout(keys=mask.detach().squeeze(-1) > 0)
    return out + mask.to(out.dtype) * branch(x, layout)  # eq. (6)


def split(branch: Branch, x: Tensor, out: Tensor, mask: Tensor) -> Tensor:
    """As :func:`masked`, for less: no gradient flows through the branch at inactive tokens, so none is prepared.

    Their update is multiplied by 0, eq. (5): its gradient to the branch and its input is exactly zero, and only its
    value is needed, for the gradient of the dispatcher; where nothing asks for that, they do not run at all.
    Gradients are those of :func:`masked`, time and memory of the inactive tokens are saved. For branches that treat
    each token on its own (an MLP).
    The arguments are those of :func:`masked`.
    """
    rows = x.flatten(0, 1)
    runs = mask.detach().flatten() > 0
    active, inactive = runs.nonzero().squeeze(1), (~runs).nonzero().squeeze(1)
    update = branch(rows.index_select(0, active).unsqueeze(0), DENSE)
    if not mask.requires_grad:  # nobody asks what the inactive tokens would have gained
        return out.flatten(0, 1).index_add(0, active, update.squeeze(0).to(out.dtype)).view(x.shape)
    with torch.no_grad():
        idle = branch(rows.index_select(0, inactive).unsqueeze(0), DENSE)
    order = torch.empty_like(runs, dtype=torch.long)
    order[torch.cat([active, inactive])] = torch.arange(len(order), device=order.device)
    update = torch.cat([update, idle], dim=1).squeeze(0).index_select(0, order)
    return out + mask.to(out.dtype) * update.view(x.shape)  # eq. (6)


def masked_all_keys(branch: Branch, x: Tensor, out: Tensor, mask: Tensor) -> Tensor:
    """As :func:`masked`, but inactive tokens may be attended to: eq. (5) taken literally, for comparison.

    For attention this trains another function than inference computes. The arguments are those of :func:`masked`.
    """
    return out + mask.to(out.dtype) * branch(x, DENSE)  # eq. (6)


def packed(branch: Branch, x: Tensor, out: Tensor, mask: Tensor) -> Tensor:
    """Gather the active tokens of all images into one row, run the branch on these only, scatter back.

    Images of a batch may differ in their number of active tokens. Writes into ``out`` in place, hence for inference
    only.

    Args:
        branch: The heavy branch.
        x: Its input, (B, N, C).
        out: What the update is added to, (B, N, C); may be overwritten.
        mask: (B, N, 1), 0 or 1.

    Returns:
        (B, N, C).
    """
    active = mask.flatten().nonzero().squeeze(1)  # (K,)
    if active.numel() == 0:
        check_tracing()
        return out
    layout = Layout(lengths=_lengths(mask))
    update = branch(x.flatten(0, 1).index_select(0, active).unsqueeze(0), layout).squeeze(0)  # (K, C)
    # a model without prefix tokens hands over transposed tokens: flatten would copy those, and the writes be lost
    rows = out.contiguous().flatten(0, 1)
    return rows.index_add_(0, active, update.to(out.dtype)).view(x.shape)  # eq. (6), active rows only


def read_prefix(branch: Branch, x: Tensor, out: Tensor, mask: Tensor, *, pack: bool) -> Tensor:
    """Only the update of the leading tokens of each image, which attend to the active ones.

    For the last layer below a head that reads nothing else. The leading tokens must be active.

    Args:
        branch: The heavy branch.
        x: Its input, (B, N, C).
        out: What the update is added to, (B, read, C).
        mask: (B, N, 1), 0 or 1.
        pack: Compute keys and values of the active tokens only; otherwise of all, and hide the inactive ones.

    Returns:
        (B, read, C).
    """
    read = out.shape[1]
    if not pack:
        return out + branch(x, Layout(keys=mask.detach().squeeze(-1) > 0, read=read))
    active = mask.flatten().nonzero().squeeze(1)
    rows = x.flatten(0, 1).index_select(0, active).unsqueeze(0)
    return out + branch(rows, Layout(lengths=_lengths(mask), read=read))


def _lengths(mask: Tensor) -> tuple[int, ...]:
    """Active tokens of each image."""
    return tuple(mask.sum(dim=(1, 2)).int().tolist())


EXECUTORS: dict[str, Callable[[Branch, Tensor, Tensor, Tensor], Tensor]] = {
    'masked': masked,
    'split': split,
    'masked_all_keys': masked_all_keys,
    'packed': packed,
}
