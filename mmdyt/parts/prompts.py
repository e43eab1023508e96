"""Learned tokens in the sequence. B images, N tokens, C width, m prompts, p patch size."""

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmdyt.core.options import check_probability, is_integer
from mmdyt.core.part import TokenOp
from mmdyt.core.tokens import TokenState


class Prompts(TokenOp):
    """Visual prompts between the prefix and the patch tokens: [CLS, prompts, patches], without positions.

    Shallow ones enter the first block and are carried on; deep ones take the place of the former before every block.
    They are never dispatched, and stripped from whatever a head reads. Source: Visual Prompt Tuning (Jia et al., arXiv
    2203.12119), eqs. (4) to (8).

    Args:
        dim: C.
        patch_values: Input values of a patch, 3 p^2: sets the range of the start values.
        length: m >= 0.
        dropout: On the prompts in training, in [0, 1).

    Shape:
        (B, N, C) -> (B, N + m, C), or (B, N, C) where there are m prompts already.

    Raises:
        ValueError: If an argument is out of range.
    """

    word = 'prompts'
    step = 'enter'

    def __init__(self, dim: int, patch_values: int, length: int = 10, dropout: float = 0.1):
        super().__init__()
        if not (is_integer(length) and length >= 0):
            raise ValueError(f'length must be a number of prompts, got {length!r}.')
        check_probability(dropout=dropout)
        self.bound = math.sqrt(6 / (patch_values + dim))
        self.tokens = nn.Parameter(torch.empty(length, dim))
        self.dropout = dropout
        self.reset_parameters()

    @classmethod
    def add_to(cls, block: Any, deep: bool = False, **options) -> None:
        """Attach them to the first block, ``deep`` ones to every block; widths are filled in."""
        if deep or block.place.index == 0:
            cls(block.place.dim, block.place.patch_values, **options).attach(block)

    def reset_parameters(self) -> None:
        """Uniform in plus and minus sqrt(6 / (3 p^2 + C))."""
        nn.init.uniform_(self.tokens, -self.bound, self.bound)

    def forward(self, x: Tensor, state: TokenState) -> Tensor:
        """Put the prompts into the sequence."""
        tokens = self.tokens.expand(x.shape[0], -1, -1)  # each image loses entries of its own
        return state.insert(x, F.dropout(tokens, self.dropout, self.training))

    def prompts(self) -> int:
        """The number of prompts, m."""
        return len(self.tokens)

    def extra_repr(self) -> str:
        """Show the options in ``print(model)``."""
        return f'length={len(self.tokens)}, dropout={self.dropout}'
