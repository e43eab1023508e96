"""Attention among active tokens only, in the layout of the executor. B images, H heads, N tokens, D head width."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class Lengths:
    """How many active tokens each image has. A GPU is waited for only when somebody asks.

    Args:
        mask: (B, N, 1), 0 or 1.
        surplus: Rows behind those of the last image that belong to none, and whose update nobody reads.
    """

    def __init__(self, mask: Tensor, surplus: int = 0):
        self._mask = mask
        self._surplus = (surplus,) if surplus else ()
        self._found: tuple[int, ...] | None = None

    def __call__(self) -> tuple[int, ...]:
        """One number for each image, and that of surplus rows if there are some."""
        check_tracing()
        if self._found is None:
            self._found = (*self._mask.detach().sum(dim=(1, 2)).int().tolist(), *self._surplus)
        return self._found


@dataclass(frozen=True, eq=False)
class Layout:
    """Which tokens may attend to each other: what a branch that mixes tokens must know. MLPs ask for the queries only.

    Attributes:
        keys: (B, N) bool, the tokens that may be attended to, for tokens laid out as (B, N, C); None is all.
        lengths: Active tokens of each image, for those packed into one row (1, sum(lengths), C); None where images have
            equally many, or nothing is packed.
        read: Leading tokens of each image whose update is wanted, (B, read, C); None is all of them.
        rows: The tokens among all B * N whose update is wanted, image by image, for tokens laid out as (B, N, C) which
            may all be attended to; None is all. The update is laid out as (B, K, C), or packed where there are lengths.
        bias: (B, 1, 1, N), added to the scores of the keys, for tokens laid out as (B, N, C); None is nothing.
    """

    keys: Tensor | None = None
    lengths: Lengths | None = None
    read: int | None = None
    rows: Tensor | None = None
    bias: Tensor | None = None

    @property
    def every_query(self) -> bool:
        """Whether the update of every token is wanted."""
        return self.read is None and self.rows is None

    def queries(self, x: Tensor) -> Tensor:
        """The tokens of ``x`` whose update is wanted: (B, read, C), (B, K, C), packed (1, K, C), or all of ``x``."""
        if self.rows is not None:
            found = x.flatten(0, 1).index_select(0, self.rows)
            return found.unflatten(0, (1 if self.lengths is not None else x.shape[0], -1))
        if self.read is None or self.lengths is None:
            return x[:, : self.read]
        starts = torch.tensor((0, *self.lengths()[:-1]), device=x.device).cumsum(0)
        return x[0, starts[:, None] + torch.arange(self.read, device=x.device)]


DENSE = Layout()


def check_tracing() -> None:
    """Refuse to be traced or exported with the active tokens of one batch.

    Raises:
        RuntimeError: Within ``torch.jit.trace``, ``torch.export`` or ``torch.onnx.export``.
    """
    if torch.jit.is_tracing() or exporting():
        raise RuntimeError(
            "inference must be 'fixed' or 'masked' to trace or export a model, got 'packed', which would keep the "
            "numbers of active tokens of the example. 'fixed' needs a capacity: calibrate with per_image=True "
            "(tools/calibrate.py --per-image). Or build the backbone with inference='masked'."
        )


def exporting() -> bool:
    """Whether ``torch.export`` runs; torch 2.6 does not tell."""
    return getattr(torch.compiler, 'is_exporting', bool)()


def attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention within each image, through torch's fused kernels.

    Args:
        query: (B, H, N, D), or (1, H, K, D) packed; with ``layout.read`` (B, H, read, D).
        key: (B, H, N, D), or (1, H, K, D) packed together with the queries.
        value: As ``key``.
        layout: Who may attend to whom.
        dropout: Probability on the attention weights.

    Returns:
        Shape of ``query``.
    """
    if layout.lengths is None:
        visible = None if layout.keys is None else _visible(layout.keys)
        if layout.bias is not None:
            bias = layout.bias.to(query.dtype)
            visible = bias if visible is None else bias.masked_fill(~visible, -torch.inf)
        return dot_product_attention(query, key, value, visible, dropout_p=dropout)
    lengths = layout.lengths()
    if layout.rows is not None:
        packed = _padded_to_all if query.is_cuda else _image_by_image_to_all
        return packed(query, key, value, lengths, dropout)
    if layout.read is not None:
        real = _real(lengths, query.device)
        return dot_product_attention(query, _pad(key, real), _pad(value, real), _visible(real))
    packed = _padded if query.is_cuda else _image_by_image  # a GPU wants one large kernel, a CPU the least work
    return packed(query, key, value, lengths)


def dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """``F.scaled_dot_product_attention``, but written out where a CPU needs its gradient.

    The backward of the CPU's fused kernel is slower than that of the written-out softmax, and training waits for it.
    A mask is boolean (True may be attended to) or a float that is added to the scores.
    """
    if query.device.type != 'cpu' or not query.requires_grad:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float('-inf')) if boolean else scores + attn_mask
    return F.dropout(scores.softmax(dim=-1).to(value.dtype), dropout_p) @ value


def _visible(keys: Tensor) -> Tensor:
    """(B, N) -> (B, 1, 1, N); an image without any key sees all: softmax over nothing is NaN."""
    return (keys | ~keys.any(dim=1, keepdim=True))[:, None, None]


def _real(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(B, longest): which places of rows padded to the longest image hold a token."""
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]


def _pad(packed: Tensor, real: Tensor) -> Tensor:
    """(1, H, K, D) -> (B, H, longest, D)."""
    rows = packed.new_zeros(*real.shape, packed.shape[1], packed.shape[3])
    rows[real] = packed[0].transpose(0, 1)
    return rows.transpose(1, 2)


def _image_by_image(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Packed attention as one fused call per image: sum of squared lengths, nothing more."""
    parts = zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(q, k, v) for q, k, v in parts], dim=2)


def _padded(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Packed attention as one fused call on rows padded to the longest image."""
    real = _real(lengths, query.device)
    q, k, v = (_pad(t, real) for t in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=_visible(real))
    return out.transpose(1, 2)[real].transpose(0, 1)[None]


def _image_by_image_to_all(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], dropout: float
) -> Tensor:
    """Attention of packed queries (1, H, K, D) to all keys (B, H, N, D) of their image, one call per image."""
    keys, values = ([*t.split(1), t[:1]][: len(lengths)] for t in (key, value))  # surplus rows attend to anything
    parts = zip(query.split(lengths, dim=2), keys, values, strict=True)
    return torch.cat([dot_product_attention(q, k, v, dropout_p=dropout) for q, k, v in parts], dim=2)


def _padded_to_all(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], dropout: float) -> Tensor:
    """Attention of packed queries to all keys of their image, as one call on rows padded to the longest image."""
    real = _real(lengths, query.device)
    out = dot_product_attention(_pad(query, real), key, value, dropout_p=dropout)
    return out.transpose(1, 2)[real].transpose(0, 1)[None]
