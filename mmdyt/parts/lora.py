"""Low-rank updates of frozen linear layers. r rank."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmdyt.core.options import check_probability, is_integer, is_number
from mmdyt.core.part import Rewrite


class LoRA(Rewrite):
    """``W' = W + s B A``: a frozen linear layer plus a trained one of low rank, which can be merged into it.

    A fresh one changes nothing (B starts at zero). Source: LoRA (Hu et al., arXiv 2106.09685), section 4.1.

    Args:
        out_features: Rows of W, or of the part of it that is rewritten.
        in_features: Columns of W.
        rank: r >= 1.
        scale: s; the paper's alpha / r.
        dropout: On what A reads in training, in [0, 1).

    Shape:
        (..., in_features) -> (..., out_features).

    Raises:
        ValueError: If an argument is out of range.
    """

    word = 'lora'
    targets = ('attn.q', 'attn.v')

    def __init__(self, out_features: int, in_features: int, rank: int = 8, scale: float = 1.0, dropout: float = 0.1):
        super().__init__(out_features, in_features)
        if not (is_integer(rank) and rank >= 1):
            raise ValueError(f'rank must be a positive integer, got {rank!r}.')
        check_probability(dropout=dropout)
        if not is_number(scale):
            raise ValueError(f'scale must be a finite number, got {scale!r}.')
        self.scale = scale
        self.down = nn.Parameter(torch.empty(rank, in_features))  # A
        self.up = nn.Parameter(torch.empty(out_features, rank))  # B
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-uniform A, zero B."""
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        nn.init.zeros_(self.up)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``W x + b + s B A x``."""
        return F.linear(x, weight, bias) + self.scale * F.linear(F.linear(self.dropout(x), self.down), self.up)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``W + s B A``, and the bias as it is."""
        return weight + (self.scale * self.up @ self.down).to(weight), bias

    def macs_per_token(self) -> int:
        """Multiply-adds per token until it is merged: r (in + out)."""
        return self.down.numel() + self.up.numel()

    def extra_repr(self) -> str:
        """Show the options in ``print(model)``."""
        return f'rank={len(self.down)}, scale={self.scale}'
