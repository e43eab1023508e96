"""Lower the Gumbel temperature of the token dispatchers while training proceeds."""

import math

from mmengine.hooks import Hook

from mmdyt.core.options import check_choice, is_number
from mmdyt.core.part import Dispatcher
from mmdyt.registry import HOOKS

SHAPES = ('linear', 'exponential', 'cosine')


def tau_at(progress: float, start: float, end: float, by: str) -> float:
    """Temperature at ``progress``, from 0 (``start``, exactly) to 1 (``end``, exactly)."""
    if by == 'exponential':
        return start ** (1 - progress) * end**progress
    left = 1 - progress if by == 'linear' else (1 + math.cos(math.pi * progress)) / 2
    return left * start + (1 - left) * end


@HOOKS.register_module()
class TauScheduleHook(Hook):
    """Take ``tau`` of every dispatcher from ``start`` in the first iteration of training to ``end`` in the last.

    A low temperature makes the scores of eq. (4) nearly 0 or 1, as the masks are, and their gradients rare and large;
    a high one smooths both. The mask that runs does not depend on it: ``P(active) = sigmoid(logit)`` for every
    ``tau``. Source: Dynamic Tuning (arXiv 2403.11808), table 9, which compares constant temperatures with a schedule.

    The temperature follows from the iteration alone, so a resumed run goes on where it stopped. Inference uses none.
    It is logged as ``tau``.

    Args:
        start: Temperature of the first iteration, > 0.
        end: Temperature of the last iteration, > 0.
        by: ``'linear'``, ``'exponential'`` (equal factors) or ``'cosine'`` (slow at both ends).

    Raises:
        ValueError: If an argument is out of range, or, before training, if the model has no such dispatcher.
    """

    # paper silent: the shape of the decay, and whether it moves with iterations or epochs
    def __init__(self, start: float = 5.0, end: float = 0.1, by: str = 'linear'):
        for name, value in dict(start=start, end=end).items():
            if not (is_number(value) and value > 0):
                raise ValueError(f'{name} must be a positive number, got {value!r}.')
        check_choice(SHAPES, by=by)
        self.start = start
        self.end = end
        self.by = by
        self._dispatchers: list[Dispatcher] = []

    def before_train(self, runner) -> None:
        """Find the dispatchers, inside any wrapper."""
        self._dispatchers = [
            module for module in runner.model.modules() if isinstance(module, Dispatcher) and module.adjustable
        ]
        if not self._dispatchers:
            raise ValueError(
                'model must have a mmdyt.TokenDispatcher for mmdyt.TauScheduleHook, got none. '
                'Set model.backbone.dispatcher, or leave the hook out of custom_hooks.'
            )
        if runner.max_iters < 1:
            raise ValueError(f'max_iters must be at least 1 with mmdyt.TauScheduleHook, got {runner.max_iters}.')

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Set and log the temperature of this iteration."""
        tau = tau_at(runner.iter / max(runner.max_iters - 1, 1), self.start, self.end, self.by)
        for dispatcher in self._dispatchers:
            dispatcher.set_tau(tau)
        runner.message_hub.update_scalar('train/tau', tau)
