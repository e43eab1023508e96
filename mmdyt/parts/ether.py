"""Frozen linear layers turned by reflections. n blocks of a width, C_in and C_out widths of a layer."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmdyt.core.options import is_integer
from mmdyt.core.part import Rewrite


def along(x: Tensor, vectors: Tensor) -> Tensor:
    """The component of x along the unit vector u of each block: ``u u^T x``, block by block.

    Args:
        x: (..., n k).
        vectors: (n, k), of any length but 0.
    """
    unit = F.normalize(vectors.float(), dim=-1).to(x.dtype)
    blocks = x.unflatten(-1, unit.shape)
    return ((blocks * unit).sum(-1, keepdim=True) * unit).flatten(-2)


class ETHER(Rewrite):
    """``W' = W H``, ``H = I - 2 u u^T``: a frozen linear layer that reads its input reflected; the bias stays.

    H is block-diagonal with a unit vector for each block. However far training goes, H stays at a distance of 2 sqrt(n)
    from the identity, so high learning rates are safe. Source: ETHER (Bini et al., arXiv 2405.20271), eq. (1).

    Args:
        out_features: C_out; not used.
        in_features: C_in.
        blocks: n, a divisor of ``in_features``.
        reflections: 1 is the paper's, which starts as a reflection. 2 start equal, and so as the identity.
            # differs from paper: opt-in, as in Householder reflection adaptation (arXiv 2405.17484).

    Shape:
        (..., in_features) -> (..., out_features).

    Raises:
        ValueError: If an argument is out of range.
    """

    word = 'ether'

    def __init__(self, out_features: int, in_features: int, blocks: int = 1, reflections: int = 1):
        super().__init__(out_features, in_features)
        check_blocks(blocks, in_features)
        if not (is_integer(reflections) and reflections in (1, 2)):
            raise ValueError(f'reflections must be 1 or 2, got {reflections!r}.')
        self.vectors = nn.Parameter(torch.empty(reflections, blocks, in_features // blocks))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-uniform directions; two reflections are equal."""
        nn.init.kaiming_uniform_(self.vectors[0], a=math.sqrt(5))
        with torch.no_grad():
            self.vectors[1:] = self.vectors[:1]

    def _turn(self, x: Tensor) -> Tensor:
        for vectors in self.vectors:
            x = x - 2 * along(x, vectors)  # eq. (1): H x
        return x

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``W H x + b``."""
        return F.linear(self._turn(x), weight, bias)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``W H``, and the bias as it is."""
        for vectors in self.vectors.flip(0):
            weight = weight - 2 * along(weight, vectors)
        return weight, bias

    def macs_per_token(self) -> int:
        """Multiply-adds per token until it is merged: 2 C_in for each reflection."""
        return 2 * self.vectors.numel()


def check_blocks(blocks: int, *widths: int) -> None:
    """Refuse a number of blocks that does not divide the widths."""
    if not (is_integer(blocks) and blocks >= 1 and not any(width % blocks for width in widths)):
        raise ValueError(f'blocks must divide the widths {list(widths)}, got {blocks!r}.')
