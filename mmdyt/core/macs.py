"""Multiply-adds (MACs): what blocks cost from what they ran, and an op-level counter for everything else.

One multiply-add is one MAC; papers print MACs as "FLOPs". A linear layer costs one MAC per weight and token. B images,
C width; a model costs the sum of its blocks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

LAYER_NORM_MACS = 5  # per element, the paper's counter

Count = float | Tensor  # Tensors hold one entry per image


def linear_weights(module: nn.Module) -> int:
    """Weights of all linear layers in ``module``: its MACs per token, attention's two matrix products apart."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


@dataclass(frozen=True)
class BesideCost:
    """What the parts beside one branch cost.

    Attributes:
        token: Multiply-adds of the deltas for each token.
        patch: Of the dispatcher, for each patch token that it is asked about.
        image: Of the deltas, for each image.
        asked: Of the dispatcher, for each image about which it is asked.
        cell: Of the deltas for each cell whose token left.
    """

    token: int = 0
    patch: int = 0
    image: int = 0
    asked: int = 0
    cell: int = 0


@dataclass(frozen=True)
class BlockCost:
    """What a block costs for each of what it may run.

    Attributes:
        dim: C.
        query: Multiply-adds for each query: the weights of its projection and of the output's, 2 C^2 in a plain ViT.
        key: For each key: norm, and the weights of keys and values, 5 C + 2 C^2.
        row: For each token of the MLP: norm and weights, 5 C + 8 C^2 at MLP ratio 4.
        beside: Of the parts beside each branch, by site.
    """

    dim: int
    query: int
    key: int
    row: int
    beside: Mapping[str, BesideCost] = field(default_factory=dict)

    def attention(self, queries: Count, keys: Count) -> Count:
        """Of attention of some queries to some keys, with all projections: ``query q + key k + 2 q k C``."""
        return queries * self.query + keys * self.key + 2 * queries * keys * self.dim

    def mlp(self, rows: Count) -> Count:
        """Of the MLP on some tokens."""
        return rows * self.row

    def parts(self, site: str, tokens: Count, patches: Count, cells: Count = 0) -> Count:
        """Of the parts beside a branch."""
        beside = self.beside.get(site, BesideCost())
        known = tokens * beside.token + patches * beside.patch + beside.image + cells * beside.cell
        return known + beside.asked * (patches > 0)


def exact(count: Count) -> Count:
    """A count in double precision: single precision would round counts of this size."""
    return count.double() if isinstance(count, Tensor) else count


def norm_macs(tokens: Count, dim: int) -> Count:
    """LayerNorm of some tokens."""
    return tokens * LAYER_NORM_MACS * dim


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
