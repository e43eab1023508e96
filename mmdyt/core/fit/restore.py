"""What a fit or calibration that is refused gives back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn as nn

from ..observe import dynamic_branches


@contextmanager
def unless_refused(model: nn.Module) -> Iterator[None]:
    """Within the context an error puts back what there was: gates, thresholds and capacities, and substitutes."""
    found = [
        part for branch in dynamic_branches(model).values() for part in (branch.dispatcher, *branch.deltas('inactive'))
    ]
    before = [{name: value.clone() for name, value in part.state_dict().items()} for part in found]
    try:
        yield
    except BaseException:
        for part, state in zip(found, before, strict=True):
            part.load_state_dict(state)
        raise
