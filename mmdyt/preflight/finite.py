"""Does a checkpoint hold numbers? One that training left after it diverged does not."""

from collections.abc import Mapping

import torch.nn as nn
from torch import Tensor

from mmdyt.core.finite import named_tensors, not_finite, open_buffers


def check_finite(model: nn.Module, tensors: Mapping[str, Tensor], path: str) -> None:
    """Refuse weights that are not finite, of those that the model has.

    Raises:
        ValueError: Naming how many tensors, and the first.
    """
    known = model.state_dict()
    found = not_finite(((name, t) for name, t in tensors.items() if name in known), open_buffers(model))
    _refuse(found, 'its weights', path)


def check_finite_state(checkpoint: Mapping, path: str) -> None:
    """Refuse a state of training whose optimizer or averaged weights are not finite.

    Raises:
        ValueError: Naming how many tensors, and the first.
    """
    averaged = checkpoint.get('ema_state_dict') or {}
    found = not_finite(named_tensors(checkpoint.get('optimizer'), 'optimizer')) + not_finite(averaged.items(), averaged)
    _refuse(found, 'its state of training', path)


def _refuse(found: list[str], what: str, path: str) -> None:
    if found:
        raise ValueError(
            f'checkpoint must hold finite numbers, got NaN or infinity in {len(found)} of {what}, first {found[0]}: '
            f'{path}. Training had diverged: take an earlier checkpoint.'
        )
