"""Multiply-adds (MACs) of a dispatched ViT in closed form, and an op-level counter for everything else.

One multiply-add is one MAC; papers print MACs as "FLOPs". A linear layer costs one MAC per weight and token. n tokens
incl. prefix, N patch tokens, a and k tokens that run attention and MLP, incl. prefix, C width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

LAYER_NORM_MACS = 5  # per element, the paper's counter


def linear_weights(module: nn.Module) -> int:
    """Weights of all linear layers in ``module``: its MACs per token, attention's two matrix products apart."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


Count = float | Tensor  # Tensors hold one entry per image


@dataclass(frozen=True)
class ViTSize:
    """What the closed form must know of a ViT; the weights are counted per layer.

    Attributes:
        dim: C.
        patch_weights: Input values of one patch, 16 * 16 * 3.
        attn_weights: Weights of qkv and output projection, 4 C^2.
        mlp_weights: Weights of the MLP, 8 C^2 at MLP ratio 4.
        adapter_weights: Weights of a layer's adapters, 2 C d each; 0 for a plain ViT.
        dispatcher_weights: Weights of a layer's dispatchers, C each; 0 for a plain ViT.
        attn_dispatcher_weights: The part of these that decides about attention (or the whole layer).
        adapter_macs_per_image: What a layer's adapters cost beside their tokens: router and mixing of experts.
        num_prefix_tokens: Tokens that are no patch (CLS, registers).
        extra_norms: LayerNorms over all tokens outside the layers (final norm, pre-norm).
        pooled_norms: LayerNorms over one pooled token (of averaged features).
    """

    dim: int
    patch_weights: int
    attn_weights: int
    mlp_weights: int
    adapter_weights: int = 0
    dispatcher_weights: int = 0
    attn_dispatcher_weights: int = 0
    adapter_macs_per_image: int = 0
    num_prefix_tokens: int = 1
    extra_norms: int = 1
    pooled_norms: int = 0


def vit_macs(
    size: ViTSize,
    num_patches: int,
    active: Sequence[tuple[Count, Count]],
    *,
    adapted: bool = True,
    read: int | None = None,
) -> Count:
    """MACs of one image through the backbone.

    ``N C (16*16*3) + sum over layers (4aC^2 + 2a^2 C + 8kC^2 + 2nCd + NC + 5aC + 5kC) + 5nC``, a and k the tokens that
    run attention and MLP. With dispatched MLPs a = n, the form of the paper; it is linear in k, but not in a.

    Args:
        size: The ViT.
        num_patches: N.
        active: (a, k) of each layer incl. prefix tokens; its length is the depth.
        adapted: Count adapters and dispatchers. False is the plain ViT.
        read: Leading tokens that the head reads, where the last layer computes only what these need: keys and values
            of the tokens that run attention, and nothing else of the others. None is all tokens.

    Returns:
        MACs; exact for whole counts. A tensor where counts are tensors.

    Raises:
        ValueError: If an entry of ``active`` is no possible count.
    """
    tokens = num_patches + size.num_prefix_tokens
    counts = torch.cat([torch.as_tensor(count, dtype=torch.float64).flatten() for pair in active for count in pair])
    if not ((counts >= 0) & (counts <= tokens)).all():
        raise ValueError(
            f'active must hold counts in [0, {tokens}], got {counts.min():g} to {counts.max():g}. '
            'They include prefix tokens.'
        )
    # single precision would round counts of this size
    active = [tuple(c.double() if isinstance(c, Tensor) else c for c in pair) for pair in active]
    norm = LAYER_NORM_MACS * size.dim
    whole = active if read is None else active[:-1]
    attention = sum(a * (size.attn_weights + norm) + 2 * a**2 * size.dim for a, _ in whole)
    mlp = sum(k * (size.mlp_weights + norm) for _, k in whole)
    per_layer = tokens * size.adapter_weights + num_patches * size.dispatcher_weights + size.adapter_macs_per_image
    added = len(whole) * per_layer if adapted else 0
    if read is not None:
        a, half = active[-1][0], size.attn_weights / 2  # of four weights two, keys and values, are every token's
        attention = attention + a * (half + norm) + read * (half + 2 * a * size.dim)
        mlp = mlp + read * (size.mlp_weights + norm)
        if adapted:
            added += read * size.adapter_weights + num_patches * size.attn_dispatcher_weights
    final = tokens if read is None else read
    norms = (size.extra_norms * final + size.pooled_norms) * norm
    return num_patches * size.dim * size.patch_weights + attention + mlp + added + norms


def dense_vit_macs(size: ViTSize, num_patches: int, num_layers: int) -> float:
    """MACs of the plain ViT, all tokens active, without adapters and dispatchers: what "dense" means everywhere."""
    tokens = num_patches + size.num_prefix_tokens
    return vit_macs(size, num_patches, [(tokens, tokens)] * num_layers, adapted=False)


def _layer_norm_flops(input_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * LAYER_NORM_MACS * torch.Size(input_shape).numel()


def _attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    *batch, queries, width = query
    return 2 * torch.Size(batch).numel() * queries * key[-2] * (width + value[-1])


def count_macs(function: Callable[[], object]) -> int:
    """MACs of whatever ``function`` runs: convolutions, matrix products, attention (fused too) and LayerNorm.

    torch's own counter does the work. It is given the operators that it knows not in every version, each a known
    cause of wrong counts: fused attention on the CPU (counted as 0), LayerNorm; and ``nn.MultiheadAttention``'s
    fast path, which is one opaque operator, is switched off. Element-wise operators, pooling, resizing and BatchNorm
    count as 0.

    Args:
        function: Called once, without gradients. Runs on any device, ``meta`` included.
    """
    aten = torch.ops.aten
    mapping = {aten.native_layer_norm: _layer_norm_flops}
    for name in ('_scaled_dot_product_flash_attention_for_cpu', '_scaled_dot_product_fused_attention_overrideable'):
        if hasattr(aten, name):
            mapping[getattr(aten, name)] = _attention_flops
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), counter:
            function()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.get_total_flops() // 2
