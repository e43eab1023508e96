"""Attention among active tokens only, in the layout of the executor. B images, H heads, N tokens, D head width."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Layout(NamedTuple):
    """Which tokens may attend to each other: what a branch that mixes tokens must know. MLPs ignore it.

    Attributes:
        keys: (B, N) bool, the tokens that may be attended to, for tokens laid out as (B, N, C); None is all.
        lengths: Active tokens of each image, for tokens packed into one row (1, sum(lengths), C); None is not packed.
    """

    keys: Tensor | None = None
    lengths: tuple[int, ...] | None = None


DENSE = Layout()


def attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention within each image, through torch's fused kernels.

    Args:
        query: (B, H, N, D), or (1, H, K, D) packed.
        key: As ``query``.
        value: As ``query``.
        layout: Who may attend to whom.
        dropout: Probability on the attention weights.

    Returns:
        Shape of ``query``.
    """
    if layout.lengths is not None:
        packed = _padded if query.is_cuda else _image_by_image  # a GPU wants one large kernel, a CPU the least work
        return packed(query, key, value, layout.lengths)
    if layout.keys is None:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    # an image without any active token attends to all: softmax over nothing is NaN, and its update is multiplied by 0
    keys = layout.keys | ~layout.keys.any(dim=1, keepdim=True)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=keys[:, None, None], dropout_p=dropout)


def _image_by_image(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Packed attention as one fused call per image: sum of squared lengths, nothing more."""
    parts = zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(q, k, v) for q, k, v in parts], dim=2)


def _padded(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Packed attention as one fused call on rows padded to the longest image."""
    real = torch.arange(max(lengths), device=query.device) < torch.tensor(lengths, device=query.device)[:, None]

    def pad(t: Tensor) -> Tensor:  # (1, H, K, D) -> (B, H, longest, D)
        rows = t.new_zeros(*real.shape, t.shape[1], t.shape[3])
        rows[real] = t[0].transpose(0, 1)
        return rows.transpose(1, 2)

    keys = (real | ~real.any(dim=1, keepdim=True))[:, None, None]
    out = F.scaled_dot_product_attention(pad(query), pad(key), pad(value), attn_mask=keys)
    return out.transpose(1, 2)[real].transpose(0, 1)[None]
