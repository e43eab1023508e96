"""Tokens halt: a dispatcher of whole layers that never takes a token back. B images, N tokens, C width, L blocks."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmdyt.core.dispatch import Dispatch, EveryToken
from mmdyt.core.gate import gate_logits
from mmdyt.core.halting import Halting, block_scores, depth_of, prior_loss, remainder
from mmdyt.core.options import check_choice, is_number
from mmdyt.core.part import Dispatcher, TokenOp
from mmdyt.core.tokens import TokenState

from .dispatcher import check_prefix

HALTING = 'halting'  # under which a pass keeps it
SCORES = dict(layer=5.0, shared=5.0, channel=30.0)  # and beta
MAPS = ('halting', 'mean')


class HaltingDispatcher(Dispatcher):
    """Tokens halt for good: behind each block a token gives a score, and once these sum to 1 it runs no block any more.

    The dispatcher of a layer scores what the layer before gave, h = sigmoid(score); see :mod:`mmdyt.core.halting`. The
    first layer runs all. A halted token is neither query nor key, nor do the parts beside the layer run for it: it
    keeps its value. Behind the last layer the class token becomes the mean of its values by their weights p. Training
    runs the same hard masks as inference; gates learn by the weights and the losses. Source: A-ViT (Yin et al., arXiv
    2112.07658).

    differs from paper: the class token, as all prefix tokens, has scores and weights but stays in the sequence, so
    values behind its halting have the weight 0. Scores are linear in the token; the paper's is a channel of it, which a
    frozen network does not give.

    Args:
        dim: C.
        num_prefix_tokens: Leading tokens of the host (CLS, registers), which never leave.
        index: Of the layer, from 0.
        depth: L.
        score: ``'layer'``: a linear score for each layer, which starts as -beta everywhere; ``'shared'``: one for all;
            ``'channel'``: the paper's, gamma x_0 - beta of channel 0, for networks of which all is tuned.
        eps: Tokens halt at a sum of 1 - eps, in [0, 1).
        beta: How far halting is at the start; None is 5, or for ``'channel'`` the paper's 30 (75 for a ViT-S).
        gamma: Of ``'channel'``; None is the paper's 10.
        maps: What patches give to heads that read them, of the last layer: ``'halting'``, the value at halting, with
            the gradient of the mean to the gates; or ``'mean'``, the mean by the weights, as the class token.
        ponder_weight: Of the mean of n + R over the patch tokens, >= 0.
        prior_weight: Of the divergence of the scores from a Gaussian over the layers, >= 0.
        prior: Mean of that as a fraction of L, and standard deviation in layers. The paper's is 8 of 12, and 1.

    Shape:
        (B, N, C) -> :class:`~mmdyt.core.dispatch.Dispatch` with a mask of (B, N, 1), whose logits are what is left
        until a token halts.

    Raises:
        ValueError: If an argument is out of range.
    """

    stops = True
    chained = True

    def __init__(
        self,
        dim: int,
        num_prefix_tokens: int = 1,
        index: int = 1,
        depth: int = 12,
        score: str = 'layer',
        eps: float = 0.01,
        beta: float | None = None,
        gamma: float | None = None,
        maps: str = 'halting',
        ponder_weight: float = 5e-4,
        prior_weight: float = 1e-3,
        prior: Sequence[float] = (2 / 3, 1.0),
    ):
        super().__init__()
        check_prefix(num_prefix_tokens)
        check_choice(SCORES, score=score)
        check_choice(MAPS, maps=maps)
        _check_numbers(score, eps, beta, gamma)
        _check_losses(prior, ponder_weight=ponder_weight, prior_weight=prior_weight)
        self.num_prefix_tokens, self.index, self.depth = num_prefix_tokens, index, depth
        self.kind, self.eps, self.maps = score, eps, maps
        self.beta = SCORES[score] if beta is None else beta
        self.gamma = 10.0 if gamma is None else gamma
        self.ponder_weight, self.prior_weight, self.prior = ponder_weight, prior_weight, tuple(prior)
        self.gate = nn.Linear(dim, 1) if index > 0 and score != 'channel' else None
        self._before: tuple[HaltingDispatcher, ...] = ()  # whose gate this is, too; not a child
        self.reset_parameters()

    @classmethod
    def add_to(cls, block: Any, site: str | None = None, **options) -> None:
        """Attach one, and behind the last layer what gives the means.

        Raises:
            ValueError: If not whole layers are dispatched, with active keys only.
        """
        if block.dispatch != 'layer' or block.branch('layer').keys != 'active':
            raise ValueError(
                f"dispatch must be 'layer', and keys 'active', with a {cls.__name__}, got {block.dispatch!r} and "
                f'{[branch.keys for branch in block.branches().values()]}.'
            )
        place = block.place
        dispatcher = cls(place.dim, place.prefix, place.index, place.depth, **options)
        dispatcher.attach(block, site or 'layer')
        if place.index == place.depth - 1:
            HaltedOutput(dispatcher.maps).attach(block)

    def follow(self, before: Dispatcher | None) -> None:
        """Take over the gate of the layer before, where all share one."""
        if self.kind == 'shared' and isinstance(before, HaltingDispatcher) and before.scorer is not None:
            self._before, self.gate = (before,), None

    @property
    def scorer(self) -> nn.Linear | None:
        """The gate, its own or a shared one."""
        return self._before[0].scorer if self._before else self.gate

    def reset_parameters(self) -> None:
        """Zero weights, bias -beta: no token is near halting.

        paper silent: with 5 the scores of 11 layers sum to 0.07, and the last layer has 0.93 of the class token.
        """
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.constant_(self.gate.bias, -self.beta)

    def score(self, x: Tensor) -> Tensor:
        """Halting scores (B, N, 1) of tokens (B, N, C), in fp32 or wider."""
        if self.kind != 'channel':
            return torch.sigmoid(gate_logits(self.scorer, x))
        channel = x[..., :1].to(torch.promote_types(x.dtype, torch.float32))
        return torch.sigmoid(self.gamma * channel - self.beta)

    def forward(self, x: Tensor, state: TokenState | None = None) -> Dispatch:
        """Decide which tokens go on, after they gave their scores."""
        state = TokenState(self.num_prefix_tokens) if state is None else state
        if self.index == 0:
            return self._first(x, state)
        tokens = without_prompts(x, state)
        halting = state.decided.get(HALTING, Halting(self.eps)).step(self.score(tokens), self._summed(tokens, state))
        state.decided[HALTING] = halting
        left = halting.left[:, state.prefix :]
        mask = (left.detach() > 0).to(left.dtype)
        return Dispatch(F.pad(mask, (0, 0, state.first, 0), value=1.0), left, state.first)

    def _first(self, x: Tensor, state: TokenState) -> Dispatch:
        """Every token runs the first layer, but padding."""
        if state.padding is None:
            return EveryToken(x, state.first)
        return Dispatch(x.new_ones(*x.shape[:2], 1), None, state.first)

    def _summed(self, tokens: Tensor, state: TokenState) -> Tensor:
        """The tokens whose mean is wanted: the prefix, and where a head reads them patches."""
        prefix, patches = tokens[:, : state.prefix], tokens[:, state.prefix :]
        if state.restoring is None or not (self.maps == 'mean' or self.training):
            return prefix
        return torch.cat([prefix, patches if self.maps == 'mean' else patches.detach()], dim=1)

    def losses(self, decided: Sequence[Dispatch]) -> dict[str, Tensor]:
        """The ponder loss, that of the prior, and for the log how many layers a patch token ran."""
        told = [dispatch.counted(dispatch.logits) for dispatch in decided if dispatch.logits is not None]
        if not told or not told[0].numel():
            return {}
        left, eps, depth = torch.stack(told, dim=1), self.eps, self.depth
        ran = depth_of(left, depth)
        blocks = torch.arange(depth - len(told), depth + 1, dtype=left.dtype, device=left.device)
        mean, std = self.prior
        return dict(
            loss_ponder=self.ponder_weight * (ran + remainder(left, eps)).mean(),
            loss_prior=self.prior_weight * prior_loss(block_scores(left, eps), blocks, mean * depth, std),
            halting_depth=ran.mean().detach(),
        )

    def macs_per_token(self) -> int:
        """Multiply-adds of a linear score: C."""
        return 0 if self.scorer is None else self.scorer.weight.numel()

    def macs_per_image(self) -> int:
        """Those of the prefix tokens, which have scores, too."""
        return self.num_prefix_tokens * self.macs_per_token()

    def extra_repr(self) -> str:
        """Show the options in ``print(model)``."""
        weights = f'ponder_weight={self.ponder_weight}, prior_weight={self.prior_weight}, prior={self.prior}'
        return f'score={self.kind!r}, eps={self.eps}, beta={self.beta}, maps={self.maps!r}, {weights}'


class HaltedOutput(TokenOp):
    """Behind the last layer, each prefix token becomes the mean of its values by their weights p, and patches may.

    Where the dispatchers were not asked (the complete model) nothing changes.

    Args:
        maps: As of :class:`HaltingDispatcher`.

    Shape:
        (B, N, C) -> (B, N, C).
    """

    word = 'halted_output'
    step = 'leave'

    def __init__(self, maps: str = 'halting'):
        super().__init__()
        self.maps = maps

    @classmethod
    def add_to(cls, block: Any, **options) -> None:
        """Never on its own."""
        raise ValueError('parts must not hold a HaltedOutput, which a HaltingDispatcher brings along, got one.')

    def forward(self, x: Tensor, state: TokenState) -> Tensor:
        """Give the means."""
        halting = state.decided.get(HALTING)
        if halting is None:
            return x
        prefix, patches = state.prefix, x[:, state.first :]
        summed = halting.output.shape[1]
        means = halting.total(without_prompts(x, state)[:, :summed])
        if summed > prefix and self.maps == 'mean':
            patches = means[:, prefix:]
        elif summed > prefix:
            patches = patches + (means[:, prefix:] - means[:, prefix:].detach())
        return torch.cat([means[:, :prefix], x[:, prefix : state.first], patches], dim=1)


def without_prompts(x: Tensor, state: TokenState) -> Tensor:
    """The tokens of prefix and patches."""
    return torch.cat([x[:, : state.prefix], x[:, state.first :]], dim=1) if state.prompts else x


def _check_numbers(score: str, eps: float, beta: float | None, gamma: float | None) -> None:
    """Refuse numbers of the scores that are none."""
    if not (is_number(eps) and 0 <= eps < 1):
        raise ValueError(f'eps must lie in [0, 1), got {eps!r}.')
    for name, value in dict(beta=beta, gamma=gamma).items():
        if value is not None and not is_number(value):
            raise ValueError(f'{name} must be a finite number or None, got {value!r}.')
    if gamma is not None and score != 'channel':
        raise ValueError(f"gamma must be None unless score is 'channel', got {gamma!r} with {score!r}.")


def _check_losses(prior: Sequence[float], **weights: float) -> None:
    """Refuse weights below 0, and what is no Gaussian over the layers."""
    for name, weight in weights.items():
        if not (is_number(weight) and weight >= 0):
            raise ValueError(f'{name} must be at least 0, got {weight!r}.')
    if not (
        isinstance(prior, Sequence) and not isinstance(prior, str) and len(prior) == 2 and all(map(is_number, prior))
    ):
        raise ValueError(f'prior must be a mean and a standard deviation, got {prior!r}.')
    if not (0 < prior[0] <= 1 and prior[1] > 0):
        raise ValueError(
            f'prior must have a mean in (0, 1], a fraction of the depth, and a positive deviation, got {prior!r}.'
        )
