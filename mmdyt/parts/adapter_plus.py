"""The bottleneck adapter behind a branch. B images, N tokens, C width, d bottleneck."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmdyt.core.options import check_probability, check_switches, is_integer
from mmdyt.core.part import Delta
from mmdyt.core.tokens import TokenState


class AdapterPlus(Delta):
    """``z + s * DropPath(Up(GELU(Down(z))))`` on every token, behind the residual connection of the MLP.

    The scale s is learned, one for each channel. A fresh one is nearly the identity. Source: Adapters Strike Back
    (Steitz and Roth, CVPR 2024, arXiv 2406.06820), Adapter+.

    Args:
        dim: C.
        bottleneck: d.
        drop_path: Probability to leave the update out for a whole image in training, in [0, 1).
        zero_up: Start ``up`` at zero, and so as the identity exactly.  # differs from paper: opt-in.

    Shape:
        (B, N, C) -> (B, N, C).

    Raises:
        ValueError: If an argument is out of range.
    """

    word = 'adapter_plus'
    place = 'serial'

    def __init__(self, dim: int, bottleneck: int = 8, drop_path: float = 0.1, zero_up: bool = False):
        super().__init__()
        if not (is_integer(bottleneck) and bottleneck >= 1):
            raise ValueError(f'bottleneck must be a positive integer, got {bottleneck!r}.')
        check_probability(drop_path=drop_path)
        check_switches(zero_up=zero_up)
        self.drop_path = drop_path
        self.zero_up = zero_up
        self.down = nn.Linear(dim, bottleneck)
        self.up = nn.Linear(bottleneck, dim)
        self.scale = nn.Parameter(torch.ones(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights (std 0.01, cut at two of these), zero biases, scale 1."""
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)
            nn.init.zeros_(linear.bias)
        if self.zero_up:
            nn.init.zeros_(self.up.weight)
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor, state: TokenState | None = None) -> Tensor:
        """The update of every token."""
        update = self.scale * self.up(F.gelu(self.down(x)))
        if not self.training or self.drop_path == 0:
            return update
        kept = update.new_empty(len(update), 1, 1).bernoulli_(1 - self.drop_path)
        return update * kept / (1 - self.drop_path)

    def macs_per_token(self) -> int:
        """Multiply-adds per token: 2 C d."""
        return self.down.weight.numel() + self.up.weight.numel()

    def extra_repr(self) -> str:
        """Show the option in ``print(model)``."""
        return f'drop_path={self.drop_path}'
