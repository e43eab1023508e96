"""An adapter that reads the adapters of earlier layers. B images, N tokens, C width, d bottleneck."""

import math
from collections.abc import Sequence
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmdyt.core.options import is_integer
from mmdyt.core.part import Delta, Part
from mmdyt.core.tokens import TokenState

LINKS = (1, 3)  # layers back


class DenseAdapter(Delta):
    """``a_l = Up ReLU(Down y + Down_1 a_(l-1) + Down_3 a_(l-3))`` beside the MLP, whose raw input y is.

    Links to layers that there are not do not exist. Where tokens become fewer in between, what earlier adapters gave
    becomes fewer by the same plan. A fresh one is the zero map. Source: Sparse-Tuning (Liu et al., arXiv 2405.14700).
    paper silent: start values (here those of :class:`~mmdyt.parts.adapter.Adapter`), the bottleneck (32 follows from
    the printed parameters); neither scale nor dropout is drawn.

    Args:
        dim: C.
        bottleneck: d.
        index: l, of the layer: tells which links there are.

    Shape:
        (B, N, C) -> (B, N, C).

    Raises:
        ValueError: If an argument is out of range.
    """

    word = 'dense_adapter'

    def __init__(self, dim: int, bottleneck: int = 32, index: int = 0):
        super().__init__()
        if not (is_integer(bottleneck) and bottleneck >= 1):
            raise ValueError(f'bottleneck must be a positive integer, got {bottleneck!r}.')
        self.index = index
        self.down = nn.Linear(dim, bottleneck)
        self.links = nn.ModuleDict({str(back): nn.Linear(dim, bottleneck) for back in LINKS if index >= back})
        self.up = nn.Linear(bottleneck, dim)
        self.reset_parameters()

    @classmethod
    def add_to(cls, block: Any, site: str | None = None, **options) -> None:
        """Attach one beside the MLP.

        Raises:
            ValueError: If there is one already: later layers read one of each.
        """
        if any(isinstance(delta, cls) for branch in block.branches().values() for delta in branch.deltas()):
            raise ValueError(f'parts must hold one DenseAdapter a layer, got two in layer {block.place.index}.')
        cls(block.place.dim, index=block.place.index, **options).attach(block, site)

    def check(self, before: Sequence[Part]) -> None:
        """Refuse to read layers without one."""
        there = {part.index for part in before if isinstance(part, DenseAdapter)}
        for back in map(int, self.links):
            if self.index - back not in there:
                raise ValueError(f'layers must hold {self.index - back}, which layer {self.index} reads, got none.')

    def reset_parameters(self) -> None:
        """Kaiming-uniform projections down, zero ``up``."""
        for linear in (self.down, *self.links.values()):
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, state: TokenState) -> Tensor:
        """Return this layer's update, and keep it for later ones."""
        inner = self.down(x)
        for back, link in self.links.items():
            before = state.carried[self.word, self.index - int(back)]
            inner = inner + link(before[:, : x.shape[1]])  # the last layer may be asked about leading tokens only
        update = self.up(F.relu(inner))
        state.carried[self.word, self.index] = update
        state.carried.pop((self.word, self.index - max(LINKS)), None)
        return update

    def alone(self, x: Tensor, state: TokenState) -> Tensor:
        """Without the links: what earlier adapters gave a cell that left is not kept."""
        return self.up(F.relu(self.down(x)))

    def macs_alone(self) -> int:
        """Multiply-adds of the projections of the cell's own value."""
        return self.down.weight.numel() + self.up.weight.numel()

    def carried(self) -> int:
        """The updates that this layer and the next two may read."""
        return min(self.index, max(LINKS))

    def macs_per_token(self) -> int:
        """Multiply-adds per token: C d for each projection."""
        return sum(linear.weight.numel() for linear in (self.down, *self.links.values(), self.up))
