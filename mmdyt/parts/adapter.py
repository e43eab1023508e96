"""The bottleneck adapter beside a frozen branch. B images, N tokens, C width, d bottleneck."""

import math

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmdyt.core import kernels
from mmdyt.core.options import check_probability, is_integer, is_number
from mmdyt.core.part import Delta
from mmdyt.core.tokens import TokenState


class Adapter(Delta):
    """Bottleneck adapter, run on every token in parallel to a frozen branch.

    A fresh adapter is the zero map (``up`` starts at zero), so an adapted model starts as the pre-trained one.
    Source: Dynamic Tuning (arXiv 2403.11808), eq. (1); the layout and the start values are AdaptFormer's.

    Args:
        dim: Token width C.
        bottleneck: Inner width d.
        scale: Factor on the output. The paper uses 0.1, and 1 for VTAB-1K.
        dropout: Dropout probability on the bottleneck, in [0, 1).

    Shape:
        (B, N, C) -> (B, N, C).

    Raises:
        ValueError: If an argument is out of range.
    """

    word = 'adapter'

    def __init__(self, dim: int, bottleneck: int = 64, scale: float = 0.1, dropout: float = 0.1):
        super().__init__()
        check_bottleneck(dim, bottleneck, scale, dropout)
        self.scale = scale
        self.down = nn.Linear(dim, bottleneck)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(bottleneck, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-uniform ``down``, zero ``up``: the zero map that still has a gradient."""
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, state: TokenState | None = None) -> Tensor:
        """Return the adapter's update of every token."""
        return self.scale * self.up(self.dropout(F.relu(self.down(x))))  # eq. (1)

    def add_update(self, out: Tensor, x: Tensor, state: TokenState) -> Tensor:
        """``out`` plus the update of ``x``; on a GPU in halves without a tensor in between."""
        halves = x.dtype in kernels.HALVES and out.dtype == x.dtype == self.down.weight.dtype
        dense = x.is_contiguous() and out.is_contiguous()
        if halves and dense and not self.training and kernels.usable(x):
            down, up = (self.down.weight, self.down.bias), (self.up.weight, self.up.bias)
            return kernels.adapted(out, x, down, up, self.scale)
        return out + self(x, state)

    def macs_per_token(self) -> int:
        """Multiply-adds per token: 2 C d."""
        return self.down.weight.numel() + self.up.weight.numel()

    def extra_repr(self) -> str:
        """Show the scale in ``print(model)``."""
        return f'scale={self.scale}'


def check_bottleneck(dim: int, bottleneck: int, scale: float, dropout: float) -> None:
    """Refuse what no adapter can have."""
    if not (is_integer(dim) and dim >= 1):
        raise ValueError(f'dim must be at least 1, got {dim!r}.')
    if not (is_integer(bottleneck) and bottleneck >= 1):
        raise ValueError(f'bottleneck must be a positive integer, got {bottleneck!r}.')
    check_probability(dropout=dropout)
    if not is_number(scale):
        raise ValueError(f'scale must be a finite number, got {scale!r}.')
