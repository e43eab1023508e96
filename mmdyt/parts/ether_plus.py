"""Frozen linear layers turned on both sides. n blocks of a width, C_in and C_out widths of a layer."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmdyt.core.part import Rewrite

from .ether import along, check_blocks


class ETHERPlus(Rewrite):
    """``W' = H_out W H_in``, ``H = I - u u^T + v v^T``: turned on both sides, by less than a reflection.

    Starts as the identity exactly, ``v = -u``, with gradients for both. Source: ETHER (Bini et al., arXiv 2405.20271),
    section 3.3.

    Args:
        out_features: C_out.
        in_features: C_in.
        blocks: n, a divisor of both.

    Shape:
        (..., in_features) -> (..., out_features).

    Raises:
        ValueError: If ``blocks`` is out of range.
    """

    word = 'ether_plus'

    def __init__(self, out_features: int, in_features: int, blocks: int = 1):
        super().__init__(out_features, in_features)
        check_blocks(blocks, in_features, out_features)
        self.inputs = nn.Parameter(torch.empty(2, blocks, in_features // blocks))  # u, v
        self.outputs = nn.Parameter(torch.empty(2, blocks, out_features // blocks))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-uniform u, and its negative."""
        for pair in (self.inputs, self.outputs):
            nn.init.kaiming_uniform_(pair[0], a=math.sqrt(5))
            with torch.no_grad():
                pair[1] = -pair[0]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``H_out W H_in x + b``."""
        y = _turn(F.linear(_turn(x, self.inputs), weight), self.outputs)
        return y if bias is None else y + bias.to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``H_out W H_in``, and the bias as it is."""
        return _turn(_turn(weight, self.inputs).T, self.outputs).T, bias

    def macs_per_token(self) -> int:
        """Multiply-adds per token until it is merged: 4 (C_in + C_out)."""
        return 2 * (self.inputs.numel() + self.outputs.numel())


def _turn(x: Tensor, pair: Tensor) -> Tensor:
    """``x - u u^T x + v v^T x``, block by block."""
    return x - along(x, pair[0]) + along(x, pair[1])
