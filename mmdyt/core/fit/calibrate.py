"""Thresholds with which the activation rate of inference is the one that was asked for. L dispatched branches.

Training fixes the mean of ``sigmoid(logit)``, the chance that a token is active; inference counts the logits above 0.
The two differ, and so the rate drifts. Here a few images show which thresholds give the wanted rate.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ..observe import decisions, dynamic_branches, eval_mode, record_dispatch, sampled
from ..part import Dispatcher
from .request import CalibrationRequest
from .restore import unless_refused

TOLERANCE = 1e-3  # of the rate, where it is searched over whole forward passes
STEPS = 40  # of a search

Forwards = Sequence[Callable[[], object]]


class Calibrated(NamedTuple):
    """What calibration did to one branch.

    Attributes:
        threshold: Of its dispatcher, in logit units; -inf runs every token.
        rate: Fraction of active patch tokens, measured on the calibration images.
        capacity: Of its dispatcher; None where the threshold decides.
    """

    threshold: float
    rate: float
    capacity: float | None = None


def check_per_image(dispatchers: dict[str, Dispatcher], per_image: bool) -> None:
    """Refuse equal rates of all images where one decision is made for all tokens of an image.

    Raises:
        ValueError: Naming the first such branch.
    """
    for name, dispatcher in dispatchers.items():
        if per_image and not dispatcher.per_token:
            raise ValueError(f'per_image must be False with the {type(dispatcher).__name__} of {name}, got True.')


def token_dispatchers(model: nn.Module) -> dict[str, Dispatcher]:
    """The dispatchers of a model that have a threshold, by the module name of their branch, in network order.

    Where branches share a decision they share the dispatcher that makes it.

    Raises:
        ValueError: If there are none.
    """
    found = {name: branch.dispatcher.decider for name, branch in dynamic_branches(model).items()}
    adjustable = {name: dispatcher for name, dispatcher in found.items() if dispatcher.adjustable}
    if not adjustable:
        others = sorted({type(dispatcher).__name__ for dispatcher in found.values()})
        got = f'a {others[0]}, which has none' if others else 'none'
        raise ValueError(f'model must have a dispatcher with a threshold, a TokenDispatcher, got {got}.')
    return adjustable


@torch.no_grad()
def calibrate(model: nn.Module, forwards: Forwards, request: CalibrationRequest) -> dict[str, Calibrated]:
    """Set the thresholds of a trained model such that its activation rate on some images is the wanted one.

    The rate is the mean over the branches of their fractions of active patch tokens. The rules divide it:

    - ``rate_matched``: each branch keeps the share of active tokens that training gave it, the mean of
      ``sigmoid(logit)`` in a pass with sampled masks. Where these shares do not average to ``target_rate``, one
      offset is added to all logits, the same for every branch, such that they do: unlike factors or summands of the
      rates this keeps them in [0, 1] and branches that are nearly closed or open nearly so.
    - ``uniform``: each branch has the rate ``target_rate``.
    - ``global``: all branches have the same threshold, found over whole passes, to 0.001 of the rate.

    Thresholds that meet a rate on these images may miss it on others, that look different. ``per_image`` leaves no room
    for that: each branch then takes the best tokens of every image, as many as the rule gave it on average.

    The first two rules are exact on these images up to ties of logits: a threshold lies midway between two neighbouring
    logits. Branches are set in network order, each in a pass of its own, since the decisions of one change what the
    next ones see. The result depends neither on the present thresholds nor on the state of the random number
    generators, and leaves the latter and the training mode as they were.

    Args:
        model: Its branches run as in inference, whatever mode it is in.
        forwards: Each runs the model on some images; all are called L + 3 times (``global``: some 6 times), and once
            more for ``per_image``.
        request: Its ``target_rate`` is wanted, its ``rule`` is one of the above, and its ``per_image`` sets capacities
            too, the rates that the thresholds gave: every image then has the same rate, whatever it shows, to the
            nearest token of each branch.

    Returns:
        What was set, and the rate that it gave, by branch name. Branches that no patch token reached are left out, and
        as they were.

    Raises:
        ValueError: If the request has no rate, the model has no thresholds, its logits are not finite, or the forward
            passes show it no image; thresholds and capacities are then as before.
    """
    target_rate, rule = request.target_rate, request.rule
    if target_rate is None:
        raise ValueError('target_rate must be given, got None.')
    if not forwards:
        raise ValueError('forwards must hold at least one forward pass, got none.')
    with unless_refused(model), eval_mode(model):
        dispatchers = _reached(model, forwards, request.per_image)
        if rule == 'global':
            _set_all(model, forwards, dispatchers, target_rate)
        else:
            shares = dict.fromkeys(dispatchers, target_rate)
            if rule == 'rate_matched':
                shares = _trained_shares(model, forwards, dispatchers, target_rate)
            _set_in_order(model, forwards, dispatchers, shares)
        rates = measured_rates(model, forwards)
        if request.per_image:
            for name, rate in rates.items():
                dispatchers[name].set_rule(capacity=rate)
            rates = measured_rates(model, forwards)
    found = {name: dispatchers[name] for name in rates}
    return {name: Calibrated(d.threshold.item(), rates[name], d.capacity) for name, d in found.items()}


@torch.no_grad()
def measured_rates(model: nn.Module, forwards: Forwards) -> dict[str, float]:
    """Fraction of active patch tokens at inference, by branch name, of branches with a threshold that saw any.

    Raises:
        ValueError: If the model has no thresholds.
    """
    with eval_mode(model):
        masks = _observe(model, forwards, 'patch_mask', token_dispatchers(model))
    return {name: mask.mean().item() for name, mask in masks.items()}


def threshold_for(logits: Tensor, share: float) -> float:
    """The threshold above which a share of the logits lies, to the nearest logit.

    Midway between the two logits that it parts. Equal logits cannot be parted: then all or none of them are above it,
    whichever is nearer to the share, and none if both are. A share that is all of them gives -inf.

    Args:
        logits: (M,), finite.
        share: In [0, 1].
    """
    values = logits.sort(descending=True).values
    active = round(share * len(values))
    if active == len(values):
        return -math.inf
    edge = values[active]
    before, through = (values > edge).sum().item(), (values >= edge).sum().item()  # of the equal ones
    active = before if active - before <= through - active else through
    if active == len(values):
        return -math.inf
    below = values[active]
    above = values[max(active - 1, 0)]
    middle = below + (above - below) / 2
    return (middle if middle < above else below).item()  # neighbouring floats have nothing between them


def _reached(model: nn.Module, forwards: Forwards, per_image: bool) -> dict[str, Dispatcher]:
    """The dispatchers that decide about a patch token, by branch name; checks that there is something to calibrate."""
    dispatchers = token_dispatchers(model)
    check_per_image(dispatchers, per_image)
    logits = _logits(model, forwards, dispatchers)
    if not logits:
        raise ValueError('forwards must run the model, dispatched, on images with patch tokens, got none.')
    for name in logits:
        dispatchers[name].set_rule()
    return {name: dispatchers[name] for name in logits}


def _set_in_order(
    model: nn.Module, forwards: Forwards, dispatchers: dict[str, Dispatcher], shares: dict[str, float]
) -> None:
    """Give each branch its share of active tokens, in network order."""
    for name, dispatcher in dispatchers.items():
        logits = _logits(model, forwards, [name])[name]
        dispatcher.set_rule(threshold_for(logits, shares[name]))


def _set_all(model: nn.Module, forwards: Forwards, dispatchers: dict[str, Dispatcher], target_rate: float) -> None:
    """Give all branches the threshold with which the mean of their rates is the wanted one.

    The quantile of all logits would be right if they did not change with it. They do, so it is taken again, within the
    thresholds that were found too low and too high.
    """
    low, high, threshold = -math.inf, math.inf, -math.inf
    distances = {}
    for _ in range(STEPS):
        set_threshold(dispatchers, threshold)
        logits = _logits(model, forwards, dispatchers)
        rate = _mean({name: (values > threshold).double().mean().item() for name, values in logits.items()})
        distances[threshold] = abs(rate - target_rate)
        if distances[threshold] <= TOLERANCE:
            break
        low, high = (threshold, high) if rate > target_rate else (low, threshold)
        threshold = threshold_for(torch.cat(list(logits.values())), target_rate)
        if not low < threshold < high:
            threshold = _between(low, high)
    set_threshold(dispatchers, min(distances, key=distances.get))


def _between(low: float, high: float) -> float:
    """A number between two, which may be infinite."""
    if math.isinf(low):
        return min(high - 1, 0.0)
    return low + 1 if math.isinf(high) else (low + high) / 2


def set_threshold(dispatchers: dict[str, Dispatcher], threshold: float) -> None:
    """The same threshold for some branches, and no capacity; 0 is the paper's, -inf runs every token."""
    for dispatcher in dispatchers.values():
        dispatcher.set_rule(threshold)


def _trained_shares(
    model: nn.Module, forwards: Forwards, dispatchers: dict[str, Dispatcher], target_rate: float
) -> dict[str, float]:
    """Share of active tokens of each branch in training, with all logits moved alike so that they meet the rate."""
    devices = {p.device for p in model.parameters() if p.device.type == 'cuda'}
    with torch.random.fork_rng(devices), decisions(model, dict.fromkeys(dispatchers, sampled)):
        torch.manual_seed(0)  # the same noise each time
        logits = _logits(model, forwards, dispatchers)

    def shares_at(offset: float) -> dict[str, float]:
        return {name: (values.double() + offset).sigmoid().mean().item() for name, values in logits.items()}

    return shares_at(_bisect(lambda offset: _mean(shares_at(offset)), target_rate))


def _bisect(rate_at: Callable[[float], float], target_rate: float) -> float:
    """Where a function that rises from 0 to 1 has the wanted rate."""
    low, high = -1.0, 1.0
    while rate_at(low) > target_rate:
        low *= 2
    while rate_at(high) < target_rate:
        high *= 2
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if rate_at(middle) < target_rate else (low, middle)
    return (low + high) / 2


def _logits(model: nn.Module, forwards: Forwards, names: Iterable[str]) -> dict[str, Tensor]:
    """All logits of some branches, (M,), of those that saw a patch token."""
    logits = _observe(model, forwards, 'logits', names)
    for name, values in logits.items():
        if not values.isfinite().all():
            raise ValueError(f'logits must be finite, got nan or inf in {name}. Has training diverged?')
    return logits


def _observe(model: nn.Module, forwards: Forwards, part: str, names: Iterable[str]) -> dict[str, Tensor]:
    """One part of all dispatches of some branches, flat, of those that decided about a patch token."""
    seen = {name: [] for name in names}
    with record_dispatch(model) as record:
        for forward in forwards:
            forward()
            for name, parts in seen.items():
                # the complete model decides nothing, and has no logits
                parts += [d.counted(getattr(d, part)) for d in record.dispatches[name] if d.logits is not None]
            record.clear()
    joined = {name: torch.cat(parts) for name, parts in seen.items() if parts}
    return {name: values for name, values in joined.items() if values.numel()}


def _mean(rates: dict[str, float]) -> float:
    return sum(rates.values()) / len(rates)
