"""What Dynamic Tuning adds to a host's losses, term by term; each pass that terms share runs once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from mmdyt.core.dispatch import Dispatch
from mmdyt.core.levels import level_masks
from mmdyt.core.losses import activation_rate, distillation_loss, rate_loss
from mmdyt.core.observe import DispatchRecord, complete_model, dynamic_branches, record_dispatch


class Pass(NamedTuple):
    """What one forward pass of a host gave.

    Attributes:
        logits: The prediction that is distilled; None where nothing is.
        losses: The host's own.
        dispatches: What was decided, of all branches.
        features: Inputs and outputs of each pass of the backbone.
        record: What was decided, by branch and pass of the backbone; None where nothing is.
    """

    logits: Tensor | None
    losses: dict
    dispatches: list[Dispatch]
    features: list[tuple[tuple, tuple]]
    record: DispatchRecord | None = None


class Passes:
    """The forward passes of one training step, each run when a term first asks for it.

    Args:
        host: A model with a ``backbone``.
        run: Runs it: the prediction, where it will be distilled, and the host's losses.
    """

    def __init__(self, host: nn.Module, run: Callable[[], tuple[Tensor | None, dict]]):
        self._host = host
        self._run = run

    @cached_property
    def dynamic(self) -> Pass:
        """With the masks of training."""
        features: list[tuple[tuple, tuple]] = []
        handle = self._host.backbone.register_forward_hook(lambda module, args, out: features.append((args, out)))
        try:
            with record_dispatch(self._host) as record:
                logits, losses = self._run()
        finally:
            handle.remove()
        return Pass(logits, losses, record.flat(), features, record)

    @cached_property
    def complete(self) -> Pass:
        """Of the complete model; without gradients where no loss of its own is asked for."""
        # a teacher that is not itself trained needs no gradient
        learns = self._host.complete_weight > 0 and torch.is_grad_enabled()
        with complete_model(self._host), kept_statistics(self._host), torch.set_grad_enabled(learns):
            logits, losses = self._run()
        return Pass(logits, losses, [], [])


Term = Callable[[Any, Passes], dict]


def feature_term(host: Any, passes: Passes) -> dict:
    """Distance of the features from those of the host's teacher, the mean over the passes of the backbone."""
    if host.teacher is None:
        return {}
    terms = [
        host.teacher.loss(host.backbone, args, out, _feature_masks(host, passes, index))
        for index, (args, out) in enumerate(passes.dynamic.features)
    ]
    return dict(loss_features=sum(terms) / len(terms))


def _feature_masks(host: Any, passes: Passes, index: int) -> tuple[Tensor, ...] | None:
    """Active shares of the cells of one pass's features, level by level, where the teacher weighs by them."""
    if not host.teacher.inactive_weight:
        return None
    decided, (_, features) = passes.dynamic.record.of_pass(index), passes.dynamic.features[index]
    # padding skips, but nothing is missed there: it counts as little as what ran
    return level_masks(decided, host.backbone.out_indices, features[0], padded=1.0)


def rate_term(host: Any, passes: Passes) -> dict:
    """The rate loss, and ``activation_rate`` of the sampled masks for the log."""
    rate = activation_rate(passes.dynamic.dispatches)
    return dict(loss_rate=host.rate_weight * rate_loss(rate, host.target_rate), activation_rate=rate.detach())


def complete_term(host: Any, passes: Passes) -> dict:
    """The host's losses of the complete model."""
    if not host.complete_weight:
        return {}
    return {f'complete.{k}': _weighted(k, value, host.complete_weight) for k, value in passes.complete.losses.items()}


def distill_term(host: Any, passes: Passes) -> dict:
    """Divergence of the dynamic model's prediction from the complete one's."""
    if not host.distill_weight:
        return {}
    student = passes.dynamic.logits
    check_logits(student, host.distill_weight)
    return dict(loss_distill=host.distill_weight * distillation_loss(student, passes.complete.logits))


def check_logits(logits: Any, distill_weight: float) -> None:
    """Refuse to distil what is no choice between classes: softmax over one of them is always 1.

    Raises:
        ValueError: If there are not two or more along the second axis.
    """
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not (isinstance(logits, Tensor) and logits.dim() >= 2 and logits.shape[1] >= 2):
        raise ValueError(
            f'distill_weight must be 0 with logits that are not (B, K) or (B, K, H, W) of two or more classes, got '
            f'{distill_weight} with {shape}.'
        )


def decision_term(host: Any, passes: Passes) -> dict:
    """What dispatchers ask of decisions beside their rate, the mean over the passes of the backbone."""
    branches, record = dynamic_branches(host), passes.dynamic.record
    alike: dict[tuple, list[str]] = {}  # branches of one site whose dispatchers are of one kind
    for name, branch in branches.items():
        alike.setdefault((type(branch.dispatcher), name.rpartition('.')[2]), []).append(name)
    found: dict[str, Tensor] = {}
    for names in alike.values():
        last, number = branches[names[-1]].dispatcher, len(record.dispatches[names[0]])
        for index in range(number):
            decided = record.of_pass(index)
            for key, value in last.losses([decided[name] for name in names]).items():
                found[key] = found.get(key, 0.0) + value / number
    return found


TERMS: tuple[Term, ...] = (feature_term, rate_term, decision_term, complete_term, distill_term)


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """Within the context norms (of heads) normalise as ever, and do not update their running statistics.

    Inference normalises what the dynamic model gives; the complete model's features must not be mixed in.
    """
    # not by a momentum of 0: batches are counted all the same, and without a momentum the count is what averages
    kept = [(m, 'track_running_stats', False) for m in model.modules() if isinstance(m, _BatchNorm)]
    kept += [(m, 'momentum', 0.0) for m in model.modules() if isinstance(m, _InstanceNorm)]
    before = [getattr(norm, name) for norm, name, _ in kept]
    try:
        for norm, name, value in kept:
            setattr(norm, name, value)
        yield
    finally:
        for (norm, name, _), value in zip(kept, before, strict=True):
            setattr(norm, name, value)


def _weighted(name: str, value: Tensor | list[Tensor], weight: float) -> Tensor | list[Tensor]:
    """A loss times its weight; what is not a loss (an accuracy) as it is."""
    if 'loss' not in name:
        return value
    return [weight * v for v in value] if isinstance(value, list) else weight * value
