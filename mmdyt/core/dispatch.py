"""What a dispatcher decides, and the masks it decides with. B images, N tokens incl. P prefix tokens, M = N - P."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Dispatch(NamedTuple):
    """What a dispatcher decided for one batch of tokens.

    Attributes:
        mask: (B, N, 1), exactly 0 or 1; its gradient is that of the soft score (straight-through). Prefix
            tokens are always 1.
        logits: (B, N - P, 1) in fp32, before noise and temperature; None where no dispatcher ran.
        num_prefix_tokens: P, the leading tokens (CLS, registers, prompts) that are always active.
        complete: Whether every token runs, whatever it is; nothing then waits for the mask.
    """

    mask: Tensor
    logits: Tensor | None
    num_prefix_tokens: int
    complete: bool = False

    @property
    def patch_mask(self) -> Tensor:
        """(B, N - P, 1): the mask of the patch tokens, the ones that rates are counted on."""
        return self.mask[:, self.num_prefix_tokens :]


def every_token(x: Tensor, num_prefix_tokens: int) -> Dispatch:
    """The dispatch of the complete model on tokens ``x`` (B, N, C); its mask takes no memory."""
    return Dispatch(x.new_ones(()).expand(*x.shape[:2], 1), None, num_prefix_tokens, complete=True)


def with_broken_tokens(dispatch: Dispatch, x: Tensor) -> Dispatch:
    """The dispatch with every token active that is no number (NaN, infinite), whatever was decided about it.

    Skipped, it would hide from the tokens that attend to active ones only: an image of NaN would get a finite score.

    Args:
        dispatch: What was decided about ``x``. Where it has logits, these tell which tokens are broken.
        x: (B, N, C).
    """
    if dispatch.complete:
        return dispatch
    prefix = dispatch.num_prefix_tokens
    told_by = x[:, prefix:] if dispatch.logits is None else dispatch.logits
    broken = F.pad(~told_by.isfinite().all(dim=-1, keepdim=True), (0, 0, prefix, 0))
    return dispatch._replace(mask=dispatch.mask.masked_fill(broken, 1.0))


def gumbel_sigmoid(logits: Tensor, tau: float) -> Tensor:
    """Noisy soft score of each token, eq. (4): ``sigmoid((logits + G1 - G2) / tau)``.

    The noise is drawn in the dtype of ``logits``, which must be fp32 or wider: in half precision the tails of the
    Gumbel distribution are lost. ``P(score > 0.5) = sigmoid(logits)`` for every ``tau``.

    Args:
        logits: Any shape.
        tau: Gumbel temperature, > 0.

    Shape:
        Same as ``logits``.
    """
    gumbel = -torch.empty_like(logits).exponential_().log()
    gumbel2 = -torch.empty_like(logits).exponential_().log()
    return torch.sigmoid((logits + gumbel - gumbel2) / tau)  # eq. (4)


def straight_through(score: Tensor, hard: Tensor | None = None) -> Tensor:
    """Hard mask with the gradient of ``score``, eq. (5); the mask is ``score > 0.5`` unless it is given.

    ``score - score.detach()`` is exactly zero, so the mask is exactly 0 or 1 in any precision.

    paper silent: eq. (5) says "Block(X) * S backward". Read here as in every straight-through estimator: the *mask* has
    the gradient of S. The gradient into Block(X) keeps the hard mask, that of the function which ran.

    Shape:
        Same as ``score``.
    """
    if hard is None:
        hard = (score > 0.5).to(score.dtype)
    return hard + (score - score.detach())


def hard_mask(logits: Tensor, threshold: Tensor) -> Tensor:
    """Noise-free mask of inference: ``logit > threshold``, compared in the dtype of ``logits``.

    A threshold of 0 is eq. (3): ``logit > 0`` is ``sigmoid(logit) > 0.5`` without its rounding.

    differs from paper: a tie, sigmoid = 0.5, is inactive here and active in eq. (3).

    Args:
        logits: Any shape, in fp32 or wider.
        threshold: A scalar of any dtype, in logit units.

    Shape:
        Same as ``logits``.
    """
    return (logits > threshold.to(logits)).to(logits.dtype)


def top_mask(logits: Tensor, capacity: float) -> Tensor:
    """Noise-free mask with the same number of active tokens in each image: those of the highest logits.

    Args:
        logits: (B, M, 1).
        capacity: Fraction of the M tokens that are active, in [0, 1], to the nearest token.

    Shape:
        Same as ``logits``.
    """
    active = logits.topk(round(capacity * logits.shape[1]), dim=1).indices
    return torch.zeros_like(logits).scatter_(1, active, 1.0)
