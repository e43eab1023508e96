"""The mixture-of-experts adapter. B images, N tokens, C width, d bottleneck, E experts."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmdyt.core.options import check_choice, is_integer
from mmdyt.core.part import Delta
from mmdyt.core.tokens import TokenState

from .adapter import check_bottleneck

ROUTINGS = ('frame', 'clip')


class MoEAdapter(Delta):
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
        routing: What one mixture is chosen for: ``'frame'``, every image on its own, or ``'clip'``, all frames of a
            clip together; the pass says how many these are.  # paper silent
        mix: ``'weights'``, or ``'outputs'`` for comparison.

    Shape:
        (B, N, C) -> (B, N, C).

    Raises:
        ValueError: If an argument is out of range.
    """

    word = 'adapter'
    reads_all = True  # the router
    ACTIVATIONS = dict(softmax=lambda z: z.softmax(dim=-1), sigmoid=torch.sigmoid, none=lambda z: z)

    def __init__(
        self,
        dim: int,
        bottleneck: int = 64,
        num_experts: int = 4,
        scale: float = 0.1,
        dropout: float = 0.1,
        router_activation: str = 'softmax',
        routing: str = 'frame',
        mix: str = 'weights',
    ):
        super().__init__()
        check_bottleneck(dim, bottleneck, scale, dropout)
        if not (is_integer(num_experts) and num_experts >= 1):
            raise ValueError(f'num_experts must be a positive integer, got {num_experts!r}.')
        check_choice(self.ACTIVATIONS, router_activation=router_activation)
        check_choice(ROUTINGS, routing=routing)
        check_choice(('weights', 'outputs'), mix=mix)
        self.scale = scale
        self.router_activation = router_activation
        self.routing = routing
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

    def expert_weights(self, x: Tensor, state: TokenState | None = None) -> Tensor:
        """The mixture of each image, (B, E), from the mean of all its tokens ``x`` (B, N, C), or of its clip's."""
        mean = x.mean(dim=1)  # (B, C)
        frames = state.frames if state is not None and self.routing == 'clip' else 1
        if frames > 1:
            clips = mean.unflatten(0, (-1, frames)).mean(dim=1)
            mean = clips.repeat_interleave(frames, dim=0)
        return self.ACTIVATIONS[self.router_activation](self.router(mean))

    def forward(self, x: Tensor, state: TokenState | None = None) -> Tensor:
        """Return the update of every token by the adapter of its image."""
        a = self.expert_weights(x, state)
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
