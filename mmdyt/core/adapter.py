"""Adapters: the small trained networks beside a frozen branch. B images, N tokens, C width, d bottleneck, E experts."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Adapter(nn.Module):
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

    def __init__(self, dim: int, bottleneck: int = 64, scale: float = 0.1, dropout: float = 0.1):
        super().__init__()
        _check_arguments(dim, bottleneck, scale, dropout)
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

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapter's update of every token."""
        return self.scale * self.up(self.dropout(F.relu(self.down(x))))  # eq. (1)

    def macs_per_token(self) -> int:
        """Multiply-adds per token: 2 C d."""
        return self.down.weight.numel() + self.up.weight.numel()

    def macs_per_image(self) -> int:
        """Multiply-adds per image beside the tokens': none."""
        return 0

    def extra_repr(self) -> str:
        """Show the scale in ``print(model)``."""
        return f'scale={self.scale}'


class MoEAdapter(nn.Module):
    """Mixture-of-experts adapter: the experts' *weights* are mixed, once per image, into one adapter.

    Costs one adapter per token, however many experts. Source: Dynamic Tuning (arXiv 2403.11808), eq. (7). Mixing
    weights is another function than mixing the experts' outputs, because of the ReLU and the cross terms;
    ``mix='outputs'`` is the latter, for comparison: it runs every expert.

    Args:
        dim: Token width C.
        bottleneck: Inner width d of each expert.
        num_experts: E, at least 1.
        scale: Factor on the output.
        dropout: Dropout probability on the bottleneck, in [0, 1).
        router_activation: ``'softmax'``, ``'sigmoid'`` or ``'none'``.  # paper silent
        frames_per_clip: T, for frames folded into the batch: the mixture is that of the whole clip. 1 routes every
            image or frame on its own.
        mix: ``'weights'``, or ``'outputs'`` for comparison.

    Shape:
        (B, N, C) -> (B, N, C).

    Raises:
        ValueError: If an argument is out of range.
    """

    ACTIVATIONS = dict(softmax=lambda z: z.softmax(dim=-1), sigmoid=torch.sigmoid, none=lambda z: z)

    def __init__(
        self,
        dim: int,
        bottleneck: int = 64,
        num_experts: int = 4,
        scale: float = 0.1,
        dropout: float = 0.1,
        router_activation: str = 'softmax',
        frames_per_clip: int = 1,
        mix: str = 'weights',
    ):
        super().__init__()
        _check_arguments(dim, bottleneck, scale, dropout)
        for name, value in dict(num_experts=num_experts, frames_per_clip=frames_per_clip).items():
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f'{name} must be a positive integer, got {value!r}.')
        if router_activation not in self.ACTIVATIONS:
            raise ValueError(f'router_activation must be one of {list(self.ACTIVATIONS)}, got {router_activation!r}.')
        if mix not in ('weights', 'outputs'):
            raise ValueError(f"mix must be 'weights' or 'outputs', got {mix!r}.")
        self.scale = scale
        self.router_activation = router_activation
        self.frames_per_clip = frames_per_clip
        self.mix = mix
        self.router = nn.Linear(dim, num_experts)
        self.down_weight = nn.Parameter(torch.empty(num_experts, bottleneck, dim))
        self.down_bias = nn.Parameter(torch.empty(num_experts, bottleneck))
        self.up_weight = nn.Parameter(torch.empty(num_experts, dim, bottleneck))
        self.up_bias = nn.Parameter(torch.empty(num_experts, dim))
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert as a fresh :class:`Adapter`: zero maps, whatever the mixture."""
        self.router.reset_parameters()  # paper silent: torch's start values
        for weight in self.down_weight:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        for zero in (self.down_bias, self.up_weight, self.up_bias):
            nn.init.zeros_(zero)

    def expert_weights(self, x: Tensor) -> Tensor:
        """The mixture of each image, (B, E), from the mean of all its tokens ``x`` (B, N, C), or of its clip's."""
        mean = x.mean(dim=1)  # (B, C)
        if self.frames_per_clip > 1:
            if len(mean) % self.frames_per_clip:
                raise ValueError(
                    f'frames_per_clip must divide the frames of a batch, got {self.frames_per_clip} and {len(mean)}.'
                )
            clips = mean.unflatten(0, (-1, self.frames_per_clip)).mean(dim=1)
            mean = clips.repeat_interleave(self.frames_per_clip, dim=0)
        return self.ACTIVATIONS[self.router_activation](self.router(mean))

    def forward(self, x: Tensor) -> Tensor:
        """Return the update of every token by the adapter of its image."""
        a = self.expert_weights(x)
        return self.scale * (self._mix_weights(x, a) if self.mix == 'weights' else self._mix_outputs(x, a))

    def _mix_weights(self, x: Tensor, a: Tensor) -> Tensor:
        """One adapter per image, of the weights that the mixture ``a`` (B, E) gives."""
        down = torch.einsum('be,edc->bcd', a, self.down_weight)  # eq. (7)
        up = torch.einsum('be,ecd->bdc', a, self.up_weight)  # eq. (7)
        hidden = self.dropout(F.relu(x @ down + (a @ self.down_bias)[:, None]))
        return hidden @ up + (a @ self.up_bias)[:, None]  # eq. (1)

    def _mix_outputs(self, x: Tensor, a: Tensor) -> Tensor:
        """Every expert on every token, their outputs mixed by ``a`` (B, E)."""
        hidden = torch.einsum('bnc,edc->bend', x, self.down_weight) + self.down_bias[:, None]
        outputs = torch.einsum('bend,ecd->benc', self.dropout(F.relu(hidden)), self.up_weight) + self.up_bias[:, None]
        return (a[:, :, None, None] * outputs).sum(dim=1)

    def macs_per_token(self) -> int:
        """Multiply-adds per token: 2 C d, as of one adapter; E times as many for ``mix='outputs'``."""
        one = self.down_weight[0].numel() + self.up_weight[0].numel()
        return one * (len(self.down_weight) if self.mix == 'outputs' else 1)

    def macs_per_image(self) -> int:
        """Multiply-adds per image of the router and, for ``mix='weights'``, of mixing: E (C + 2 C d + d + C)."""
        mixing = sum(p.numel() for p in (self.down_weight, self.down_bias, self.up_weight, self.up_bias))
        return self.router.weight.numel() + (mixing if self.mix == 'weights' else 0)


def _check_arguments(dim: int, bottleneck: int, scale: float, dropout: float) -> None:
    """Refuse what no adapter can have."""
    if dim < 1:
        raise ValueError(f'dim must be at least 1, got {dim}.')
    if not (isinstance(bottleneck, int) and bottleneck >= 1):
        raise ValueError(f'bottleneck must be a positive integer, got {bottleneck!r}.')
    if not 0 <= dropout < 1:
        raise ValueError(f'dropout must lie in [0, 1), got {dropout}. It is a probability, not percent.')
    if not (isinstance(scale, int | float) and math.isfinite(scale)):
        raise ValueError(f'scale must be a finite number, got {scale!r}.')
