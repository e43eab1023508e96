"""Dispatchers fitted in closed form to what it costs to skip a token.

B images, N tokens, C width, M tokens of a batch. The update of a token in one branch enters the residual stream times
its mask, ``x + m * branch(x)``. So the derivative of the loss by ``m`` tells, to first order, how the loss changes when
the token skips: its *evidence*. A gate that predicts the logarithm of its size from the token, as the dispatcher reads
it, gives logits that mean the same in every branch, and one threshold for all of them spends a budget where it matters.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ..block import Block
from ..dispatch import Dispatch
from ..observe import decisions, dynamic_branches, eval_mode
from ..options import is_number
from ..part import Dispatcher
from ..tokens import TokenState
from .calibrate import token_dispatchers
from .ridge import Moments

SCALE = 1024.0  # of the loss, so that half precision keeps small derivatives; evidence is relative
FLOOR = 1e-6  # of the mean evidence of an image: the logarithm of less says nothing

Losses = Sequence[Callable[[], Tensor]]


class Reached(NamedTuple):
    """What reached a branch: tokens N of each image, and the leading ones whose result is wanted; None is all."""

    tokens: int
    read: int | None


class Decided(NamedTuple):
    """Input (B, N, C) of a dispatcher, what it decided, and what was known of the tokens then."""

    x: Tensor
    dispatch: Dispatch
    state: TokenState


def fit_dispatchers(model: nn.Module, losses: Losses, ridge: float = 1e-3, per_mac: bool = False) -> dict[str, float]:
    """Set the gates of a model such that their logits predict the log evidence of each token.

    Evidence is the absolute derivative of the loss by the token's mask, in units of the image's mean over all its
    tokens and branches: images that are easy, or learnt by heart, have small derivatives and would say nothing
    otherwise. The gates are linear, so the fit is a ridge regression in closed form: no step of training, no learning
    rate. Thresholds are not touched; :func:`mmdyt.core.fit.calibrate.calibrate` with the rule ``global`` sets them.

    Source: the importance of first order of Molchanov et al. (Importance Estimation for Neural Network Pruning, CVPR
    2019), of a token's update instead of a weight.  # differs from paper: dispatchers are not trained.

    Evidence is that of a token's own update. Where active tokens attend to each other only (``attn``, ``layer``) what
    it gives to others as a key is not in it; with ``keys='all'`` that is never lost, and the evidence is complete. A
    ``SampleDispatcher`` is fitted to single tokens, and then reads their mean. Branches that share a decision have one
    mask: its derivative is the sum of theirs, and evidence is that for each of them.

    Args:
        model: Runs in eval mode, with the masks that it has; inactive tokens have evidence too.
        losses: Each returns a scalar loss of some images.
        ridge: Weight of the squared norm of the gate, in units of the mean variance of its inputs, > 0.
        per_mac: Predict evidence per multiply-add that skipping saves: right for one threshold where branches differ
            in cost, as attention and MLP do. The rate is then that of a budget of multiply-adds, not of tokens.

    Returns:
        The share of the variance of the log evidence that the fit explains, by branch name, of branches that patch
        tokens reached.

    Raises:
        ValueError: If the model has no dispatcher with a gate, there is no loss, one does not
            depend on the dispatched branches, or none gives finite evidence; then nothing is changed.
    """
    dispatchers = token_dispatchers(model)
    if not (is_number(ridge) and ridge > 0):
        raise ValueError(f'ridge must be a positive number, got {ridge!r}.')
    if not losses:
        raise ValueError('losses must hold at least one loss, got none.')
    moments: dict[str, Moments] = {}
    reached: dict[str, Reached] = {}
    with eval_mode(model):
        for loss in losses:
            for name, (inputs, outcomes, reached[name]) in _log_evidence(model, dispatchers, loss).items():
                found = moments.setdefault(name, Moments(inputs.shape[1], inputs.device))
                found.add(inputs, outcomes)
    if not all(found.count for found in moments.values()):
        raise ValueError('losses must give finite evidence for some image, got none. Has training diverged?')
    explained, costs = {}, dict.fromkeys(dispatchers, 1.0)
    if per_mac:
        costs = _costs(model, {name: reached[deciding] for name, deciding in _deciding(dispatchers, moments).items()})
    with torch.no_grad():
        for name, found in moments.items():
            weight, bias, explained[name] = found.solve(ridge)
            shared = sum(costs[other] for other, dispatcher in dispatchers.items() if dispatcher is dispatchers[name])
            dispatchers[name].set_gate(weight, bias - math.log(shared))
    return explained


def _deciding(dispatchers: Mapping[str, Dispatcher], names: Iterable[str]) -> dict[str, str]:
    """The branch among some whose dispatcher decides for a branch, by its name, of those that have one."""
    deciding = {dispatchers[name]: name for name in names}
    return {name: deciding[dispatcher] for name, dispatcher in dispatchers.items() if dispatcher in deciding}


def _costs(model: nn.Module, reached: Mapping[str, Reached]) -> dict[str, float]:
    """What skipping saves, in units of the mean over the branches, by branch name."""
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, Block)}
    costs = {
        branch: block.token_macs(site, *reached[branch])
        for name, block in blocks.items()
        for site in block.branches()
        if (branch := f'{name}.dynamic.{site}'.lstrip('.')) in reached
    }
    if costs.keys() != reached.keys():
        raise ValueError('per_mac must be False for branches outside a mmdyt.core.block.Block, got True.')
    mean = sum(costs.values()) / len(costs)
    return {name: cost / mean for name, cost in costs.items()}


def _log_evidence(
    model: nn.Module, dispatchers: dict[str, Dispatcher], loss: Callable[[], Tensor]
) -> dict[str, tuple[Tensor, Tensor, Reached]]:
    """Inputs of the gates (M, C) and log evidence (M,) of one batch, and what reached the branch, by its name."""
    with torch.enable_grad(), _differentiable_masks(model) as seen:
        value = loss() * SCALE
        found = {name: decided for name, decided in seen.items() if name in dispatchers}
        found = {name: one for name, one in found.items() if one.dispatch.patch_mask.shape[1]}
        if not (value.requires_grad and found):
            raise ValueError('losses must depend on the dispatched branches of the model, got one that does not.')
        gradients = torch.autograd.grad(value, [one.dispatch.mask for one in found.values()], allow_unused=True)
    evidence, inputs, reached, counts = {}, {}, {}, {}
    for (name, (x, dispatch, state)), gradient in zip(found.items(), gradients, strict=True):
        values = torch.zeros_like(dispatch.mask) if gradient is None else gradient.abs()
        evidence[name] = values[:, dispatch.num_prefix_tokens :, 0]
        inputs[name] = x[:, dispatch.num_prefix_tokens :].flatten(0, 1)
        reached[name] = Reached(x.shape[1], state.read)
        counts[name] = torch.ones_like(evidence[name]) if state.padding is None else 1.0 - state.padding.float()
    means = [(values * counts[name]).sum(1) / counts[name].sum(1) for name, values in evidence.items()]
    mean = torch.stack(means).mean(0)[:, None]  # (B, 1)
    mean = mean.where(mean.isfinite(), math.nan)  # an overflow anywhere spoils its image
    logs = {name: (values / mean + FLOOR).log() for name, values in evidence.items()}
    # not an image without any evidence, and no padding
    finite = {name: (values.isfinite() & (counts[name] > 0)).flatten() for name, values in logs.items()}
    return {name: (inputs[name][finite[name]], logs[name].flatten()[finite[name]], reached[name]) for name in logs}


@contextmanager
def _differentiable_masks(model: nn.Module) -> Iterator[dict[str, Decided]]:
    """Within the context the masks of all dispatchers are leaves of the graph, whose derivative can be asked for.

    Yields:
        What was decided, by branch name, as the model runs.
    """
    seen: dict[str, Decided] = {}

    def rule(name: str, dispatcher: Dispatcher, x: Tensor, state: TokenState) -> Dispatch:
        dispatch = dispatcher(x, state)
        dispatch = dispatch.with_mask(dispatch.mask.detach().requires_grad_())
        seen[name] = Decided(x.detach().float(), dispatch, state.replaced())
        return dispatch

    with decisions(model, {name: partial(rule, name) for name in dynamic_branches(model)}):
        yield seen
