"""Multiply-adds (MACs) of a dispatched ViT in closed form, and an op-level counter for everything else.

One multiply-add is one MAC; papers print MACs as "FLOPs". A linear layer costs one MAC per weight and token. n tokens
incl. prefix, N patch tokens, k active tokens incl. prefix, C width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

LAYER_NORM_MACS = 5  # per element, the paper's counter


def linear_weights(module: nn.Module) -> int:
    """Weights of all linear layers in ``module``: its MACs per token, attention's two matrix products apart."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


@dataclass(frozen=True)
class ViTSize:
    """What the closed form must know of a ViT with MLP dispatch; the weights are counted per layer.

    Attributes:
        dim: C.
        patch_weights: Input values of one patch, 16 * 16 * 3.
        attn_weights: Weights of qkv and output projection, 4 C^2.
        mlp_weights: Weights of the MLP, 8 C^2 at MLP ratio 4.
        adapter_weights: Weights of the adapter, 2 C d; 0 for a plain ViT.
        dispatcher_weights: Weights of the dispatcher, C; 0 for a plain ViT.
        num_prefix_tokens: Tokens that are no patch (CLS, registers).
        extra_norms: LayerNorms over all tokens outside the layers (final norm, pre-norm).
    """

    dim: int
    patch_weights: int
    attn_weights: int
    mlp_weights: int
    adapter_weights: int = 0
    dispatcher_weights: int = 0
    num_prefix_tokens: int = 1
    extra_norms: int = 1


def vit_macs(size: ViTSize, num_patches: int, active: Sequence[float], *, adapted: bool = True) -> float:
    """MACs of one image through the backbone.

    ``N C (16*16*3) + sum over layers (4nC^2 + 2n^2 C + 8kC^2 + 2nCd + NC + 5nC + 5kC) + 5nC``. Linear in k, so mean
    counts give mean MACs.

    Args:
        size: The ViT.
        num_patches: N.
        active: k of each layer incl. prefix tokens; its length is the depth.
        adapted: Count adapters and dispatchers. False is the plain ViT.

    Returns:
        MACs; exact for whole ``active``.

    Raises:
        ValueError: If an entry of ``active`` is no possible count.
    """
    tokens = num_patches + size.num_prefix_tokens
    if not all(0 <= k <= tokens for k in active):
        raise ValueError(f'active must hold counts in [0, {tokens}], got {list(active)}. They include prefix tokens.')
    norm = LAYER_NORM_MACS * size.dim
    attention = tokens * size.attn_weights + 2 * tokens**2 * size.dim
    added = (tokens * size.adapter_weights + num_patches * size.dispatcher_weights) * adapted
    per_layer = attention + added + tokens * norm
    mlp = sum(k * (size.mlp_weights + norm) for k in active)
    return (
        num_patches * size.dim * size.patch_weights + len(active) * per_layer + mlp + size.extra_norms * tokens * norm
    )


def dense_vit_macs(size: ViTSize, num_patches: int, num_layers: int) -> float:
    """MACs of the plain ViT, all tokens active, without adapters and dispatchers: what "dense" means everywhere."""
    tokens = num_patches + size.num_prefix_tokens
    return vit_macs(size, num_patches, [tokens] * num_layers, adapted=False)


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
