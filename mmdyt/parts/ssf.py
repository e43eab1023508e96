"""Scales and shifts of what frozen layers give."""

import torch
import torch.nn as nn
from torch import Tensor

from mmdyt.core.options import check_switches
from mmdyt.core.part import Rewrite


class SSF(Rewrite):
    """``y = gamma * f(x) + beta`` behind each frozen linear, norm and the patch embedding; merges into any of them.

    Source: Scaling and Shifting your Features (Lian et al., arXiv 2210.08823), eq. (3).
    # differs from paper: a fresh one changes nothing; ``official`` starts as the published code does.

    Args:
        out_features: Channels that are scaled.
        in_features: Of the frozen layer; not used.
        official: Draw the start values, gamma from N(1, 0.02) and beta from N(0, 0.02), which is no identity.

    Shape:
        That of the frozen layer.
    """

    word = 'ssf'
    targets = ('all',)
    only_linears = False

    def __init__(self, out_features: int, in_features: int, official: bool = False):
        super().__init__(out_features, in_features)
        check_switches(official=official)
        self.official = official
        self.gamma = nn.Parameter(torch.empty(out_features))
        self.beta = nn.Parameter(torch.empty(out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Ones and zeros, or drawn around these."""
        std = 0.02 if self.official else 0.0
        nn.init.normal_(self.gamma, mean=1.0, std=std)
        nn.init.normal_(self.beta, std=std)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``gamma * f(x) + beta``."""
        y = self.plain(x, weight, bias)
        return y * self.gamma.to(y.dtype) + self.beta.to(y.dtype)  # eq. (3)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """``gamma W`` and ``gamma b + beta``, by output channel."""
        gamma, beta = self.gamma.to(weight), self.beta.to(weight)
        return weight * gamma.view(-1, *[1] * (weight.dim() - 1)), beta if bias is None else gamma * bias + beta
