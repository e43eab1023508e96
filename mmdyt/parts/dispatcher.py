"""Dispatchers: which tokens run the heavy branch. B images, N tokens incl. P prefix tokens, C width."""

import math
from collections.abc import Iterable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmdyt.core.dispatch import Dispatch, best_tokens, gumbel_sigmoid, hard_mask, straight_through
from mmdyt.core.gate import gate_logits, set_gate
from mmdyt.core.options import check_switches, is_integer, is_number
from mmdyt.core.part import Dispatcher
from mmdyt.core.tokens import TokenState


class TokenDispatcher(Dispatcher):
    """One linear score per patch token; prefix tokens are always active.

    Training samples the mask with Gumbel noise, eqs. (3) to (5); inference is noise-free, ``logit > threshold``. The
    buffer ``threshold`` is 0, the paper's, until :meth:`set_rule` changes it, as calibration does. With a ``capacity``
    inference takes the best tokens of each image instead, equally many of each, as in Mixture-of-Depths (Raposo et al.,
    2024). Training with noise reads neither. The score is computed in fp32 under any autocast. Source: Dynamic Tuning
    (arXiv 2403.11808), eqs. (3) to (5).

    Attributes:
        threshold: Buffer, logit units.
        capacity: Fraction of the patch tokens of each image that are active, in [0, 1]; None leaves it to the
            threshold. A number of Python, so that nothing waits for a GPU to tell it; saved with the buffers.

    Args:
        dim: Token width C.
        num_prefix_tokens: Leading tokens of the host (CLS, registers) that are always active, as prompts are.
        tau: Gumbel temperature of training, > 0. The paper uses 5.
        initial_rate: Chance that a token with a score of 0 is active at the start, in (0, 1): sets the bias. 0.5 is the
            paper's. A high one starts from the pre-trained network, nearly complete, and lets the rate loss close it.
            # differs from paper: opt-in.
        noise: Whether training samples. Without noise it decides as inference does, with the gradient of
            ``sigmoid((logit - threshold) / tau)``.  # differs from paper: opt-in.
        fitted: Whether the gate is set from data (:mod:`mmdyt.core.fit`), and not trained.
            # differs from paper: opt-in.

    Shape:
        (B, N, C) -> :class:`Dispatch` with a mask of (B, N, 1).

    Raises:
        ValueError: If an argument is out of range.
    """

    adjustable = True

    def __init__(
        self,
        dim: int,
        num_prefix_tokens: int = 1,
        tau: float = 5.0,
        initial_rate: float = 0.5,
        noise: bool = True,
        fitted: bool = False,
    ):
        super().__init__()
        if not (is_integer(dim) and dim >= 1):
            raise ValueError(f'dim must be at least 1, got {dim!r}.')
        check_prefix(num_prefix_tokens)
        if not (is_number(initial_rate) and 0 < initial_rate < 1):
            raise ValueError(
                f'initial_rate must lie in (0, 1), got {initial_rate!r}. Rates are fractions, not percent.'
            )
        check_switches(noise=noise, fitted=fitted)
        self.num_prefix_tokens = num_prefix_tokens
        self.set_tau(tau)
        self.initial_rate = initial_rate
        self.noise = noise
        self.fitted = fitted
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
        self.set_rule(0.0)

    def tuned_parameters(self) -> Iterable[nn.Parameter]:
        """The gate, unless it is fitted."""
        return () if self.fitted else self.parameters()

    def set_tau(self, tau: float) -> None:
        """Set the Gumbel temperature, > 0."""
        if not (is_number(tau) and tau > 0):
            raise ValueError(f'tau must be a positive number, got {tau!r}.')
        self.tau = tau

    def set_rule(self, threshold: float | Tensor | None = None, capacity: float | None = None) -> None:
        """Set how inference decides.

        Args:
            threshold: In logit units; -inf runs every token. None keeps the present one.
            capacity: Fraction of the patch tokens of each image that are active, in [0, 1]; None leaves it to the
                threshold.
        """
        if capacity is not None and not (is_number(capacity) and 0 <= capacity <= 1):
            raise ValueError(f'capacity must lie in [0, 1], got {capacity!r}. It is a fraction, not percent.')
        if isinstance(threshold, float) and math.isnan(threshold):
            raise ValueError(f'threshold must be a number or infinite, got {threshold}. No token would be active.')
        if threshold is not None:
            self.threshold.fill_(threshold)
        self.capacity = capacity

    def set_gate(self, weight: Tensor, bias: Tensor) -> None:
        """Set the gate to weights (C,) and a bias."""
        set_gate(self.gate, weight, bias)

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

    def score(self, x: Tensor, state: TokenState | None = None) -> Tensor:
        """Logits (B, M, 1) of patch tokens ``x`` (B, M, C), in fp32 (fp64 stays fp64)."""
        return gate_logits(self.gate, x)

    def decide(self, logits: Tensor, prefix: int) -> Dispatch:
        """Noise-free decision from logits (B, N - P, 1), by the capacity or else by the threshold."""
        if self.capacity is not None:
            return best_tokens(logits, self.capacity, prefix)
        return self._dispatch(hard_mask(logits, self.threshold), logits, prefix)  # eq. (3)

    def forward(self, x: Tensor, state: TokenState | None = None) -> Dispatch:
        """Decide for every token of ``x`` whether it runs the branch."""
        if self.training and self.noise:
            return self.sample(x, state)
        prefix = self._prefix(state)
        logits = self.score(x[:, prefix:], state)
        decided = self.decide(logits, prefix)
        if self.training:
            soft = torch.sigmoid((logits - self.threshold) / self.tau)
            decided = self._dispatch(straight_through(soft, decided.patch_mask), logits, prefix)
        return self.of_tokens(decided, x.shape[1], state)

    def sample(self, x: Tensor, state: TokenState | None = None) -> Dispatch:
        """Decide by chance, as training with noise does: active with probability ``sigmoid(logit)``."""
        prefix = self._prefix(state)
        logits = self.score(x[:, prefix:], state)
        dispatch = self._dispatch(straight_through(gumbel_sigmoid(logits, self.tau)), logits, prefix)  # eqs. (4), (5)
        return self.of_tokens(dispatch, x.shape[1], state)

    def of_tokens(self, dispatch: Dispatch, tokens: int, state: TokenState | None) -> Dispatch:
        """The decision about what :meth:`score` scored as one about each of N tokens: here they are the same."""
        return dispatch

    def _prefix(self, state: TokenState | None) -> int:
        """P: the host's prefix and prompts."""
        return self.num_prefix_tokens + (0 if state is None else state.prompts)

    def _dispatch(self, mask: Tensor, logits: Tensor, prefix: int) -> Dispatch:
        """A decision about patch tokens, with the prefix in front, which is always active."""
        return Dispatch(F.pad(mask, (0, 0, prefix, 0), value=1.0), logits, prefix)

    def macs_per_token(self) -> int:
        """Multiply-adds per patch token: C."""
        return self.gate.weight.numel()

    def extra_repr(self) -> str:
        """Show the options in ``print(model)``."""
        options = f'num_prefix_tokens={self.num_prefix_tokens}, tau={self.tau}, initial_rate={self.initial_rate}'
        return f'{options}, noise={self.noise}, fitted={self.fitted}'


def check_prefix(num_prefix_tokens: int) -> None:
    """Refuse a number of tokens that is none."""
    if not (is_integer(num_prefix_tokens) and num_prefix_tokens >= 0):
        raise ValueError(f'num_prefix_tokens must be at least 0, got {num_prefix_tokens!r}.')


class SampleDispatcher(TokenDispatcher):
    """One decision per image: all patch tokens of an image run the branch, or none. For comparison, table 7.

    paper silent: what the decision reads. Here the mean of the patch tokens. Arguments and shapes are those of
    :class:`TokenDispatcher`; the logits of an image's tokens are equal, and so is the noise of training.
    """

    per_token = False

    def score(self, x: Tensor, state: TokenState | None = None) -> Tensor:
        """Logit of each image of patch tokens ``x`` (B, M, C), (B, 1, 1)."""
        if state is None or state.padding is None or not x.shape[1]:
            return gate_logits(self.gate, x.mean(dim=1, keepdim=True))
        counts = (~state.padding).to(x.dtype).unsqueeze(-1)
        number = counts.sum(dim=1, keepdim=True).clamp(min=1)  # a window may lie wholly in padding
        return gate_logits(self.gate, (x * counts).sum(dim=1, keepdim=True) / number)

    def of_tokens(self, dispatch: Dispatch, tokens: int, state: TokenState | None) -> Dispatch:
        """The decision about an image for each of its tokens."""
        mask, logits, prefix = dispatch.mask, dispatch.logits, dispatch.num_prefix_tokens
        mask = torch.cat([mask[:, :prefix], mask[:, prefix : prefix + 1].expand(-1, tokens - prefix, -1)], dim=1)
        return Dispatch(mask, logits[:, :1].expand(-1, tokens - prefix, -1), prefix)

    def macs_per_token(self) -> int:
        """None: the gate runs once per image, which is not counted."""
        return 0


class RandomDispatcher(Dispatcher):
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
        if not (is_number(rate) and 0 < rate <= 1):
            raise ValueError(f'rate must lie in (0, 1], got {rate!r}. Rates are fractions, not percent.')
        check_prefix(num_prefix_tokens)
        self.num_prefix_tokens = num_prefix_tokens
        self.rate = rate

    def forward(self, x: Tensor, state: TokenState | None = None) -> Dispatch:
        """Draw the active tokens."""
        prefix = self.num_prefix_tokens + (0 if state is None else state.prompts)
        mask = torch.rand(*x.shape[:2], 1, device=x.device) < self.rate
        mask[:, :prefix] = True
        return Dispatch(mask.float(), None, prefix)

    def extra_repr(self) -> str:
        """Show the options in ``print(model)``."""
        return f'num_prefix_tokens={self.num_prefix_tokens}, rate={self.rate}'
