"""What inactive tokens get instead of the branch. B images, N tokens, C width."""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from .branch import complete_model, dynamic_branches, watch_updates
from .calibrate import eval_mode


class MeanUpdate(nn.Module):
    """One vector for all inactive tokens, the mean of the updates that they skip; it costs no multiply-add.

    The branch of a pre-trained network moves all tokens in a common direction. Tokens that skip it miss that too, and
    end where the following layers never saw one; with the mean they miss only what is their own. A fresh one is zero,
    which is what the paper gives to inactive tokens; :func:`fit_substitutes` measures it, and it may be trained on.
    Source: mean replacement (Evci et al., Mean Replacement Pruning, 2018), of tokens instead of
    units.  # differs from paper: opt-in.

    Args:
        dim: Token width C.

    Shape:
        (B, N, C) -> (C,), the same for every token.

    Raises:
        ValueError: If ``dim`` is not positive.
    """

    def __init__(self, dim: int):
        super().__init__()
        if dim < 1:
            raise ValueError(f'dim must be at least 1, got {dim}.')
        self.value = nn.Parameter(torch.zeros(dim))

    def reset_parameters(self) -> None:
        """Zero, the paper's."""
        nn.init.zeros_(self.value)

    def forward(self, x: Tensor) -> Tensor:
        """The update of the inactive ones among the tokens ``x``."""
        return self.value.to(x.dtype)


@torch.no_grad()
def fit_substitutes(model: nn.Module, forwards: Sequence[Callable[[], object]]) -> list[str]:
    """Set what inactive tokens get to the mean update that the branch gives to patch tokens, all tokens active.

    Args:
        model: Runs in eval mode, as the complete model.
        forwards: Each runs the model on some images.

    Returns:
        The names of the branches that were fitted: those that have a :class:`MeanUpdate` and ran on all tokens.
    """
    branches = {
        name: branch for name, branch in dynamic_branches(model).items() if isinstance(branch.substitute, MeanUpdate)
    }
    if not branches:
        return []
    sums = {name: torch.zeros_like(branch.substitute.value, dtype=torch.float64) for name, branch in branches.items()}
    counts = dict.fromkeys(branches, 0)

    def add(name: str, update: Tensor) -> None:
        if name in branches:
            patches = update[:, branches[name].dispatcher.num_prefix_tokens :].flatten(0, 1)
            sums[name] += patches.sum(0, dtype=torch.float64)
            counts[name] += len(patches)

    with eval_mode(model), complete_model(model), watch_updates(model, add):
        for forward in forwards:
            forward()
    fitted = [name for name, count in counts.items() if count]
    for name in fitted:
        branches[name].substitute.value.copy_(sums[name] / counts[name])
    return fitted
