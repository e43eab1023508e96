"""What inactive tokens get instead of the branch. B images, N tokens, C width."""

import torch
import torch.nn as nn
from torch import Tensor

from mmdyt.core.options import is_integer
from mmdyt.core.part import Delta
from mmdyt.core.tokens import TokenState


class MeanUpdate(Delta):
    """One vector for all inactive tokens, the mean of the updates that they skip; it costs no multiply-add.

    The branch of a pre-trained network moves all tokens in a common direction. Tokens that skip it miss that too, and
    end where the following layers never saw one; with the mean they miss only what is their own. A fresh one is zero,
    which is what the paper gives to inactive tokens; :func:`mmdyt.core.fit.mean_update.fit_mean_updates` measures it,
    and it may be trained on. Source: mean replacement (Evci et al., Mean Replacement Pruning, 2018), of tokens instead
    of units.  # differs from paper: opt-in.

    Args:
        dim: Token width C.

    Shape:
        (B, N, C) -> (C,), the same for every token.

    Raises:
        ValueError: If ``dim`` is not positive.
    """

    word = 'substitute'
    place = 'inactive'
    takes_mean = True

    def __init__(self, dim: int):
        super().__init__()
        if not (is_integer(dim) and dim >= 1):
            raise ValueError(f'dim must be at least 1, got {dim!r}.')
        self.value = nn.Parameter(torch.zeros(dim))

    def reset_parameters(self) -> None:
        """Zero, the paper's."""
        nn.init.zeros_(self.value)

    @torch.no_grad()
    def set_mean(self, mean: Tensor) -> None:
        """Give inactive tokens this update, (C,), from now on."""
        self.value.copy_(mean)

    def forward(self, x: Tensor, state: TokenState | None = None) -> Tensor:
        """The update of the inactive ones among the tokens ``x``."""
        return self.value.to(x.dtype)
