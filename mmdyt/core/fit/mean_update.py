"""What inactive tokens get, set to the mean of what they skip. B images, N tokens, C width."""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from ..observe import complete_model, dynamic_branches, eval_mode, record_dispatch, watch_updates


@torch.no_grad()
def fit_mean_updates(model: nn.Module, forwards: Sequence[Callable[[], object]]) -> list[str]:
    """Set what inactive tokens get to the mean update that the branch gives to patch tokens, all tokens active.

    Args:
        model: Runs in eval mode, as the complete model.
        forwards: Each runs the model on some images.

    Returns:
        The names of the branches that were fitted: those with a delta that takes a mean, and that ran on all tokens.
    """
    takers = {
        name: [delta for delta in branch.deltas('inactive') if delta.takes_mean]
        for name, branch in dynamic_branches(model).items()
    }
    takers = {name: deltas for name, deltas in takers.items() if deltas}
    if not takers:
        return []
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(takers, 0)

    with eval_mode(model), complete_model(model), record_dispatch(model) as record:

        def add(name: str, update: Tensor) -> None:
            if name in takers:
                dispatch = record.dispatches[name][-1]
                patches = update[:, dispatch.num_prefix_tokens :]
                padding = dispatch.padding
                patches = patches.flatten(0, 1) if padding is None else patches[~padding.squeeze(-1)]
                sums[name] = sums.get(name, 0) + patches.sum(0, dtype=torch.float64)
                counts[name] += len(patches)

        with watch_updates(model, add):
            for forward in forwards:
                forward()
                record.clear()
    fitted = [name for name, count in counts.items() if count]
    for name in fitted:
        for delta in takers[name]:
            delta.set_mean(sums[name] / counts[name])
    return fitted
