"""Losses of Dynamic Tuning as functions of tensors (arXiv 2403.11808, section 3.4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatcher import Dispatch


def activation_rate(dispatches: Sequence[Dispatch]) -> Tensor:
    """Mean of the masks over batch, branches and patch tokens; prefix tokens do not count.

    Args:
        dispatches: One entry per branch and forward pass; masks (B, N, 1).

    Returns:
        A scalar in [0, 1], with the straight-through gradient of training masks.

    Raises:
        ValueError: If nothing was dispatched.
    """
    if not dispatches:
        raise ValueError('dispatches must hold at least one mask, got none. Does the model have dispatchers?')
    return torch.cat([dispatch.patch_mask.flatten() for dispatch in dispatches]).mean()


def rate_loss(rate: Tensor, target_rate: float) -> Tensor:
    """Squared distance of the activation rate from its target: one global budget, not one per layer.

    Args:
        rate: Scalar, from :func:`activation_rate`.
        target_rate: Wanted fraction of active patch tokens, in (0, 1].
    """
    return (rate - target_rate) ** 2
