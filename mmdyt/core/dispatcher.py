"""The token dispatcher: which tokens run the heavy branch. B images, N tokens incl. P prefix tokens, C width."""

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Dispatch(NamedTuple):
    """What a dispatcher decided for one batch of tokens.

    Attributes:
        mask: (B, N, 1), exactly 0 or 1; its gradient is that of the soft score (straight-through). Prefix
            tokens are always 1.
        logits: (B, N - P, 1) in fp32, before noise and temperature; None where no dispatcher ran.
        num_prefix_tokens: P, the leading tokens (CLS, registers) that are always active.
    """

    mask: Tensor
    logits: Tensor | None
    num_prefix_tokens: int

    @property
    def patch_mask(self) -> Tensor:
        """(B, N - P, 1): the mask of the patch tokens, the ones that rates are counted on."""
        return self.mask[:, self.num_prefix_tokens :]


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


class TokenDispatcher(nn.Module):
    """One linear score per patch token; prefix tokens are always active.

    Training samples the mask with Gumbel noise, eqs. (3) to (5); inference is noise-free, ``logit > threshold``. The
    buffer ``threshold`` is 0, the paper's, until :func:`mmdyt.core.calibrate.calibrate` sets it. With a ``capacity``,
    which calibration may set too, inference takes the best tokens of each image instead, equally many of each, as in
    Mixture-of-Depths (Raposo et al., 2024). Training with noise reads neither and makes them 0 and None again, since
    they belonged to scores that change. The score is computed in fp32 under any autocast. Source: Dynamic Tuning (arXiv
    2403.11808), eqs. (3) to (5).

    Attributes:
        threshold: Buffer, logit units.
        capacity: Fraction of the patch tokens of each image that are active, in [0, 1]; None leaves it to the
            threshold. A number of Python, so that nothing waits for a GPU to tell it; saved with the buffers.

    Args:
        dim: Token width C.
        num_prefix_tokens: P, leading tokens (CLS, registers) that are always active.
        tau: Gumbel temperature of training, > 0. The paper uses 5.
        initial_rate: Chance that a token with a score of 0 is active at the start, in (0, 1): sets the bias. 0.5 is the
            paper's. A high one starts from the pre-trained network, nearly complete, and lets the rate loss close it.
            # differs from paper: opt-in.
        noise: Whether training samples. Without noise it decides as inference does, with the gradient of
            ``sigmoid((logit - threshold) / tau)``.  # differs from paper: opt-in.

    Shape:
        (B, N, C) -> :class:`Dispatch` with a mask of (B, N, 1).

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, dim: int, num_prefix_tokens: int = 1, tau: float = 5.0, initial_rate: float = 0.5, noise: bool = True
    ):
        super().__init__()
        if dim < 1:
            raise ValueError(f'dim must be at least 1, got {dim}.')
        if num_prefix_tokens < 0:
            raise ValueError(f'num_prefix_tokens must be at least 0, got {num_prefix_tokens}.')
        if not (isinstance(tau, int | float) and 0 < tau < math.inf):
            raise ValueError(f'tau must be a positive number, got {tau!r}.')
        if not (isinstance(initial_rate, int | float) and 0 < initial_rate < 1):
            raise ValueError(f'initial_rate must lie in (0, 1), got {initial_rate}. Rates are fractions, not percent.')
        self.num_prefix_tokens = num_prefix_tokens
        self.tau = tau
        self.initial_rate = initial_rate
        self.noise = noise
        self.gate = nn.Linear(dim, 1)
        self.register_buffer('threshold', torch.zeros(()))
        self.capacity: float | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal (std 0.02) weight; the bias is the logit of the initial rate, 0 for the paper's 0.5.

        The threshold becomes the paper's 0, and there is no capacity: they belonged to the former scores.
        """
        nn.init.trunc_normal_(self.gate.weight, std=0.02)
        nn.init.constant_(self.gate.bias, math.log(self.initial_rate / (1 - self.initial_rate)))
        self.threshold.zero_()
        self.capacity = None

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """With the capacity, where there is one."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.capacity is not None:
            destination[f'{prefix}capacity'] = torch.tensor(self.capacity, dtype=torch.float64)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """A gate saved before there were thresholds has the paper's 0, and nothing is missing."""
        gate = state_dict.get(f'{prefix}gate.weight')
        if gate is not None:
            state_dict.setdefault(f'{prefix}threshold', gate.new_zeros((), dtype=torch.float32))
            capacity = state_dict.pop(f'{prefix}capacity', None)
            self.capacity = None if capacity is None else capacity.item()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def score(self, x: Tensor) -> Tensor:
        """Logits (B, N - P, 1) of the patch tokens of ``x`` (B, N, C), in fp32 (fp64 stays fp64)."""
        return self._linear(x[:, self.num_prefix_tokens :])

    def _linear(self, x: Tensor) -> Tensor:
        """The gate in fp32 or wider, whatever autocast says."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.gate.weight.to(dtype), self.gate.bias.to(dtype))

    def decide(self, logits: Tensor) -> Tensor:
        """Noise-free mask (B, N - P, 1), by the capacity or else by the threshold."""
        if self.capacity is not None:
            return top_mask(logits, self.capacity)
        return hard_mask(logits, self.threshold)  # eq. (3)

    def forward(self, x: Tensor) -> Dispatch:
        """Decide for every token of ``x`` whether it runs the branch."""
        logits = self.score(x)
        if self.training and self.noise:
            if torch.is_grad_enabled():
                self.threshold.zero_()
                self.capacity = None
            mask = straight_through(gumbel_sigmoid(logits, self.tau))  # eqs. (4), (5)
        else:
            mask = self.decide(logits)
            if self.training:
                mask = straight_through(torch.sigmoid((logits - self.threshold) / self.tau), mask)
        mask = F.pad(mask, (0, 0, self.num_prefix_tokens, 0), value=1.0)  # CLS always active
        return Dispatch(mask, logits, self.num_prefix_tokens)

    def macs_per_token(self) -> int:
        """Multiply-adds per patch token: C."""
        return self.gate.weight.numel()

    def extra_repr(self) -> str:
        """Show the options in ``print(model)``."""
        options = f'num_prefix_tokens={self.num_prefix_tokens}, tau={self.tau}, initial_rate={self.initial_rate}'
        return f'{options}, noise={self.noise}'


class SampleDispatcher(TokenDispatcher):
    """One decision per image: all patch tokens of an image run the branch, or none. For comparison, table 7.

    paper silent: what the decision reads. Here the mean of the patch tokens. Arguments and shapes are those of
    :class:`TokenDispatcher`; the logits of an image's tokens are equal, and so is the noise of training.
    """

    def score(self, x: Tensor) -> Tensor:
        """Logit of each image, (B, 1, 1)."""
        return self._linear(x[:, self.num_prefix_tokens :].mean(dim=1, keepdim=True))

    def forward(self, x: Tensor) -> Dispatch:
        """Decide for every image of ``x`` whether its patch tokens run the branch."""
        patches = x.shape[1] - self.num_prefix_tokens
        mask, logits, prefix = super().forward(x)
        mask = torch.cat([mask[:, :prefix], mask[:, prefix:].expand(-1, patches, -1)], dim=1)
        return Dispatch(mask, logits.expand(-1, patches, -1), prefix)

    def macs_per_token(self) -> int:
        """None: the gate runs once per image, which is not counted."""
        return 0


class RandomDispatcher(nn.Module):
    """Every patch token runs the branch with the same probability, whatever it shows. For comparison, table 7.

    Nothing is learnt and the rate is met in expectation, in training and, drawn anew, in inference; seed the run for
    equal results. The rate loss is then a constant.

    Args:
        dim: Token width C; not used.
        num_prefix_tokens: P, leading tokens that are always active.
        rate: Probability that a patch token is active, in (0, 1].

    Shape:
        (B, N, C) -> :class:`Dispatch` with a mask of (B, N, 1), without logits.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, dim: int, num_prefix_tokens: int = 1, rate: float = 0.5):
        super().__init__()
        if not 0 < rate <= 1:
            raise ValueError(f'rate must lie in (0, 1], got {rate}. Rates are fractions, not percent.')
        self.num_prefix_tokens = num_prefix_tokens
        self.rate = rate

    def reset_parameters(self) -> None:
        """Nothing is learnt."""

    def forward(self, x: Tensor) -> Dispatch:
        """Draw the active tokens."""
        mask = torch.rand(*x.shape[:2], 1, device=x.device) < self.rate
        mask[:, : self.num_prefix_tokens] = True
        return Dispatch(mask.float(), None, self.num_prefix_tokens)

    def macs_per_token(self) -> int:
        """None."""
        return 0

    def extra_repr(self) -> str:
        """Show the options in ``print(model)``."""
        return f'num_prefix_tokens={self.num_prefix_tokens}, rate={self.rate}'
