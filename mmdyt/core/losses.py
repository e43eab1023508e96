"""Losses of Dynamic Tuning as functions of tensors (arXiv 2403.11808, section 3.4)."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Dispatch
from .options import is_number


def activation_rate(dispatches: Sequence[Dispatch]) -> Tensor:
    """Mean of the masks over batch, branches and patch tokens, of all ranks; prefix tokens and padding do not count.

    In distributed training every rank returns the rate of the whole batch, with the gradient of its own tokens, scaled
    such that averaging the gradients over the ranks gives that of the whole batch.

    Args:
        dispatches: One entry per branch and forward pass; masks (B, N, 1).

    Returns:
        A scalar in [0, 1], with the straight-through gradient of training masks.

    Raises:
        ValueError: If nothing was dispatched.
    """
    if not dispatches:
        raise ValueError('dispatches must hold at least one mask, got none. Does the model have dispatchers?')
    masks = torch.cat([dispatch.counted(dispatch.patch_mask) for dispatch in dispatches])
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return masks.mean()
    active = masks.sum()
    total = torch.stack([active.detach(), active.new_tensor(masks.numel())])
    dist.all_reduce(total)
    return total[0] / total[1] + (active - active.detach()) * dist.get_world_size() / total[1]


def check_rate(target_rate: float) -> None:
    """Refuse an activation rate that is none.

    Raises:
        ValueError: If it is out of (0, 1].
    """
    if not (is_number(target_rate) and 0 < target_rate <= 1):
        raise ValueError(f'target_rate must lie in (0, 1], got {target_rate!r}. Rates are fractions, not percent.')


def rate_loss(rate: Tensor, target_rate: float) -> Tensor:
    """Squared distance of the activation rate from its target: one global budget, not one per layer.

    Args:
        rate: Scalar, from :func:`activation_rate`.
        target_rate: Wanted fraction of active patch tokens, in (0, 1].
    """
    return (rate - target_rate) ** 2


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of the dynamic model's prediction from the complete model's, temperature 1.

    No gradient flows into the teacher. Computed in fp32. Mean over the images ("batchmean"), and over the pixels of a
    map of logits.

    Args:
        student: Logits of the dynamic model, (B, K) or (B, K, H, W).
        teacher: Logits of the complete model, of the same shape.

    Returns:
        A scalar.
    """
    log_student, log_teacher = (F.log_softmax(logits.float(), dim=1) for logits in (student, teacher.detach()))
    return F.kl_div(log_student, log_teacher, reduction='none', log_target=True).sum(dim=1).mean()
