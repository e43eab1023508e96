"""Which tokens to keep, fitted in closed form to what it costs to lose them. B images, M patch tokens, C width.

A token that a network goes on without is a key no more, and who reads its patch gets what it was. So the loss changes,
to first order, by its derivative by how much the token counts as a key in all attentions to come, and, at each level
that is read, by its derivative in the direction of what the blocks to come add to the token: the token's *evidence*. A
gate predicts the logarithm of its size from the token.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from ..context import RULES, ask
from ..observe import eval_mode, keep_all, reductions
from ..options import is_number
from ..part import TokenOp
from ..tokens import TokenState
from .evidence import FLOOR, SCALE, Losses
from .ridge import Moments


@dataclass
class Seen:
    """What a step saw in one pass with nothing reduced.

    Attributes:
        inputs: (B, M, I), what the gate reads of each patch token.
        x: (B, M, C), these tokens.
        counts: (B, M), for how many tokens each counts as a key from here on: 1, a leaf.
        padding: (B, M) bool; None is none.
        first: Place of the first patch token.
        levels: What is read from here on, and zeros added to it; filled as the pass goes on.
        before: How many of these were read before.
    """

    inputs: Tensor
    x: Tensor
    counts: Tensor
    padding: Tensor | None
    first: int
    levels: list[tuple[Tensor, Tensor]]
    before: int

    def leaves(self) -> list[Tensor]:
        """What derivatives are asked by."""
        return [self.counts, *(zeros for _, zeros in self.levels[self.before :])]

    def evidence(self, gradients: Mapping[int, Tensor]) -> Tensor:
        """(B, M): the sum of both kinds, signed, from the derivatives by id of the leaf."""
        total = gradients[id(self.counts)].float()
        for level, zeros in self.levels[self.before :]:
            moved = level.detach()[:, self.first :].float() - self.x
            total = total + (moved * gradients[id(zeros)][:, self.first :].float()).sum(-1)
        return total


def gated(model: nn.Module) -> dict[str, TokenOp]:
    """The parts of a model that make tokens fewer by a gate that can be fitted, by module name, in network order."""
    return {name: operation for name, operation in reductions(model).items() if hasattr(operation, 'set_gate')}


def fit_token_gates(model: nn.Module, losses: Losses, ridge: float = 1e-3) -> dict[str, float]:
    """Set the gates of token operations such that they predict the log evidence of each token.

    Evidence is taken with nothing reduced, in one pass forward and back for each loss, for all steps at once, in units
    of the mean over the tokens of the image. What tokens that leave are fused into is not in it. The fit is a ridge
    regression in closed form.

    Source: the importance of first order of Molchanov et al. (CVPR 2019), of a token's place among the keys instead of
    a weight.  # differs from papers: Sparse-Tuning and EViT keep what the class token attends to.

    Args:
        model: Runs in eval mode.
        losses: Each returns a scalar loss of some images.
        ridge: Weight of the squared norm of the gate, in units of the mean variance of its inputs, > 0.

    Returns:
        The share of the variance of the log evidence that the fit explains, by name of the operation. Those are left
        out, and as they were, behind which nothing is read of patches: in the last block below a class token.

    Raises:
        ValueError: If the model has no such operation, there is no loss, one does not depend on the tokens, or none
            gives finite evidence; then nothing is changed.
    """
    operations = gated(model)
    if not operations:
        raise ValueError('model must have parts that keep tokens by a gate, EvidenceTokens, got none.')
    if not (is_number(ridge) and ridge > 0):
        raise ValueError(f'ridge must be a positive number, got {ridge!r}.')
    if not losses:
        raise ValueError('losses must hold at least one loss, got none.')
    moments: dict[str, Moments] = {}
    with eval_mode(model):
        for loss in losses:
            for name, inputs, outcomes in log_evidence(model, loss):
                moments.setdefault(name, Moments(inputs.shape[1], inputs.device)).add(inputs, outcomes)
    if not any(found.count for found in moments.values()):
        raise ValueError('losses must give finite evidence for some image, got none. Has training diverged?')
    explained = {}
    for name, found in moments.items():
        if not found.count:
            continue
        weight, bias, explained[name] = found.solve(ridge)
        operations[name].set_gate(weight, bias)
    return explained


def log_evidence(model: nn.Module, loss: Callable[[], Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    """Name of the operation, tokens (M', C) and their log evidence (M',), of each pass of a batch; without padding."""
    with torch.enable_grad(), _watched(model) as passes:
        value = loss() * SCALE
        seen = [(name, one) for name, one in passes if one.x.shape[1]]
        leaves = {id(leaf): leaf for _, one in seen for leaf in one.leaves()}
        if not (value.requires_grad and leaves):
            raise ValueError('losses must depend on the tokens of the model, got one that does not.')
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    gradients = {key: torch.zeros_like(leaf) if g is None else g for (key, leaf), g in pairs}
    return [(name, *_rows(one, one.evidence(gradients).abs())) for name, one in seen]


def _rows(seen: Seen, evidence: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and outcomes of the regression: of images that have finite evidence, their tokens but for padding."""
    shows = torch.ones_like(evidence) if seen.padding is None else 1.0 - seen.padding.float()
    mean = (evidence * shows).sum(1, keepdim=True) / shows.sum(1, keepdim=True)
    mean = mean.where(mean.isfinite(), math.nan)  # an overflow anywhere spoils its image
    logs = (evidence / mean + FLOOR).log()
    good = logs.isfinite() & (shows > 0)
    return seen.inputs[good], logs[good]


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[tuple[str, Seen]]]:
    """Within the context nothing is reduced, and what each gated operation sees can be asked for derivatives.

    Yields:
        What was seen, with the name of the operation, as the model runs.
    """
    seen: list[tuple[str, Seen]] = []

    def rule(name: str, operation: TokenOp, x: Tensor, state: TokenState) -> Tensor:
        sizes = state.count_sizes(x)
        counts = torch.ones_like(sizes).requires_grad_()
        state.sizes = sizes * counts
        state.probes = [] if state.probes is None else state.probes
        patches = x.detach()[:, state.first :].float()
        inputs = operation.inputs(x, state).detach().float()
        seen.append((name, Seen(inputs, patches, counts, state.padding, state.first, state.probes, len(state.probes))))
        return x

    rules = {operation: partial(rule, name) for name, operation in gated(model).items()}
    others = dict.fromkeys(reductions(model).values(), keep_all)
    with ask(RULES, others | rules):
        yield seen
