"""From the tokens of a clip to one feature. V clips, T frames, N tokens a frame incl. prefix, C width, H heads."""

import torch
import torch.nn as nn
from torch import Tensor

from .attention import dot_product_attention
from .options import check_switches, is_integer


class CrossAttentionAggregator(nn.Module):
    """One learned query attends to all tokens of all frames of a clip.

    ``Attention(LN_q(query), LN_k(X), LN_v(X))`` over the T x N tokens X, and an output projection. As in the paper it
    does not know the order of the frames: any permutation of them gives the same feature. ``temporal_positions`` tells
    them apart. Source: Dynamic Tuning (arXiv 2403.11808), experiments on video.

    paper silent: heads, biases, start values, and whether the query is added to what it found. Here as in a block of a
    ViT, but without that residual connection: the query is the same for every clip.

    Args:
        dim: C.
        num_heads: H, a divisor of ``dim``.
        temporal_positions: T of the clips, for a learned embedding (T, C) that is added to the tokens of each frame. It
            starts at zero: a fresh aggregator is the order-blind one. 0 has none, which is the paper's form.
            # differs from paper: opt-in.
        fold_projections: Compute the same function (to rounding) in another order, since there is only one query, and
            that the same for every clip: keys and values are not projected token by token, the query goes through the
            keys' weight instead, and the weighted mean of the tokens through the values'. T N (2 C^2 + 2 C)
            multiply-adds become 2 T N H C + 2 C^2.  # differs from paper: opt-in, for less.

    Shape:
        (V, T, N, C) -> (V, C).

    Raises:
        ValueError: If an argument is out of range, or clips have another number of frames than there are positions.
    """

    def __init__(self, dim: int, num_heads: int, temporal_positions: int = 0, fold_projections: bool = False):
        super().__init__()
        if not (is_integer(num_heads) and num_heads >= 1 and dim % num_heads == 0):
            raise ValueError(f'num_heads must be a divisor of dim {dim}, got {num_heads!r}.')
        if not (is_integer(temporal_positions) and temporal_positions >= 0):
            raise ValueError(f'temporal_positions must be a number of frames, or 0, got {temporal_positions!r}.')
        self.num_heads = num_heads
        check_switches(fold_projections=fold_projections)
        self.fold_projections = fold_projections
        self.query = nn.Parameter(torch.empty(dim))
        self.temporal_positions = nn.Parameter(torch.empty(temporal_positions, dim)) if temporal_positions else None
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal (std 0.02) query and weights, zero biases and temporal positions."""
        nn.init.trunc_normal_(self.query, std=0.02)
        if self.temporal_positions is not None:
            nn.init.zeros_(self.temporal_positions)
        for norm in (self.norm_q, self.norm_k, self.norm_v):
            norm.reset_parameters()
        for linear in (self.q, self.k, self.v, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Aggregate the tokens of each clip."""
        x = self._add_positions(x).flatten(1, 2)  # (V, T * N, C)
        query, keys, values = self.q(self.norm_q(self.query)), self.norm_k(x), self.norm_v(x)
        attend = self._attend_folded if self.fold_projections else self._attend
        return self.proj(attend(query, keys, values))

    def _add_positions(self, x: Tensor) -> Tensor:
        """Mark the tokens of each frame with its place in the clip."""
        if self.temporal_positions is None:
            return x
        if x.shape[1] != len(self.temporal_positions):
            raise ValueError(
                f'temporal_positions must be the number of frames of the clips, got {len(self.temporal_positions)} for '
                f'clips of {x.shape[1]} frames.'
            )
        return x + self.temporal_positions[:, None]

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What the query (C,) finds among keys and values (V, T * N, C): (V, C)."""
        query = query.expand(len(keys), 1, -1)
        q, k, v = (self._heads(t) for t in (query, self.k(keys), self.v(values)))
        return dot_product_attention(q, k, v).transpose(1, 2).flatten(1)

    def _heads(self, x: Tensor) -> Tensor:
        """(V, n, C) -> (V, H, n, C / H)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _attend_folded(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """As :meth:`_attend`: ``q (W_k z + b_k) = (q W_k) z + const``, ``sum a (W_v z + b_v) = W_v sum a z + b_v``."""
        heads = (self.num_heads, -1)
        query = query.unflatten(0, heads) * (len(query) / self.num_heads) ** -0.5  # (H, D)
        # cancels in the softmax; left out, distributed training would miss the gradient of this bias, which is zero
        constant = (query * self.k.bias.unflatten(0, heads)).sum(dim=1)  # (H,)
        query = torch.einsum('hd,hdc->hc', query, self.k.weight.unflatten(0, heads))
        weights = (keys @ query.T + constant).transpose(1, 2).softmax(dim=-1)  # (V, H, T * N)
        means = weights.to(values.dtype) @ values  # (V, H, C)
        found = torch.einsum('vhc,hdc->vhd', means, self.v.weight.unflatten(0, heads)).flatten(1)
        return found + self.v.bias

    def extra_repr(self) -> str:
        """Show the options in ``print(model)``."""
        positions = 0 if self.temporal_positions is None else len(self.temporal_positions)
        return f'num_heads={self.num_heads}, temporal_positions={positions}, fold_projections={self.fold_projections}'
