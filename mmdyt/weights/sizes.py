"""What the tensors of a tower say of its sizes and of what it has, by our words."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Sizes(NamedTuple):
    """What the tensors say. The number of heads leaves no trace in them."""

    embed_dims: int
    num_layers: int
    hidden: int
    in_channels: int
    patch_size: int
    grid: int


class Traits(NamedTuple):
    """What a tower has beside a ViT's plain blocks.

    Attributes:
        registers: Tokens behind the class token, R.
        position_of: Tokens in front of the patches that have a position: 0, 1 (class token) or 1 + R.
        patch_bias: Of the patch embedding.
        pre_norm: A norm in front of the first block.
        qkv_bias: Of queries, keys, values; a missing one of keys alone is zero.
        split: Whether queries, keys and values have weights of their own.
        layer_scale: Behind each branch.
        swiglu: A gated MLP: names of its two linears, ``('w12', 'w3')`` or ``('fc1', 'fc2')``; None where it is plain.
        mean_patch: Whether the mean patch is read, and normalised, in place of the class token.
    """

    registers: int
    position_of: int
    patch_bias: bool
    pre_norm: bool
    qkv_bias: bool
    split: bool
    layer_scale: bool
    swiglu: tuple[str, str] | None
    mean_patch: bool


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """As a plain tuple."""
    return tuple(tensor.shape)


def measure(state: Mapping[str, Tensor], depth: int, patch_bias: bool = True) -> tuple[Sizes, Traits]:
    """Read the sizes from three tensors, the traits from what is there.

    Args:
        state: Tensors by our words.
        depth: Number of blocks.
        patch_bias: Whether the patch embedding must have a bias; else it may.

    Raises:
        ValueError: If one is missing, or is no size of a ViT on square images.
    """
    hidden_word = next((w for w in ('mlp.fc1', 'mlp.w12') if f'blocks.0.{w}.weight' in state), 'mlp.fc1')
    if 'pos_embed' not in state and 'cls_token' in state:
        raise ValueError(
            "SRC must hold position embeddings ('pos_embed'), got none. DINOv3 and EVA-02 turn queries and keys by "
            "their place (RoPE), BEiT has a bias for each pair, mmpretrain's VisionTransformer neither: use DINOv2."
        )
    words = (('patch_embed.proj.weight', 4), ('pos_embed', 3), (f'blocks.0.{hidden_word}.weight', 2))
    (dim, channels, patch, width), (_, places, _), (hidden, _) = (_shape(state, *word) for word in words)
    if patch != width:
        raise ValueError(f'patch_embed.proj.weight must have square patches, got {patch} x {width}.')
    if 'cls_token' not in state:
        raise ValueError(
            "SRC must hold 'cls_token', got none. Models without a class token (SigLIP, those that read the mean "
            'patch) are outside this converter: use CLIP or DINOv2. Or fetch the file again.'
        )
    registers = _shape(state, 'reg_token', 3)[1] if 'reg_token' in state else 0
    before, grid = _positions(places, registers)
    swiglu = _gated(state, hidden_word)
    traits = Traits(
        registers=registers,
        position_of=before,
        patch_bias=patch_bias or 'patch_embed.proj.bias' in state,
        pre_norm=any(word.startswith('norm_pre.') for word in state),
        qkv_bias=any(word.endswith(('attn.qkv.bias', 'attn.q.bias', 'attn.v.bias')) for word in state),
        split='blocks.0.attn.q.weight' in state,
        layer_scale=any(word.endswith(('ls1.gamma', 'ls2.gamma')) for word in state),
        swiglu=swiglu,
        mean_patch=any(word.startswith('fc_norm.') for word in state),
    )
    return Sizes(dim, depth, hidden // 2 if swiglu else hidden, channels, patch, grid), traits


def _shape(state: Mapping[str, Tensor], word: str, ndim: int) -> tuple[int, ...]:
    if word not in state:
        raise ValueError(f'SRC must hold {word!r}, got {len(state)} others. Fetch the file again.')
    shape = shape_of(state[word])
    if len(shape) != ndim or 0 in shape:
        raise ValueError(f'{word} must have {ndim} dimensions, none empty, got shape {shape}.')
    return shape


def _positions(places: int, registers: int) -> tuple[int, int]:
    """How many tokens in front of the patches have a position, and the side of the grid."""
    for before in dict.fromkeys((1, 0, 1 + registers)):
        grid = math.isqrt(max(places - before, 0))
        if grid and places > 1 and grid**2 == places - before:
            return before, grid
    raise ValueError(
        f'pos_embed must hold one class token and a square grid, got {places} positions. '
        'Oblong images and further prefix tokens are outside this converter.'
    )


def _gated(state: Mapping[str, Tensor], first: str) -> tuple[str, str] | None:
    """The linears of a gated MLP, whose first makes twice as many values as the second takes."""
    if first == 'mlp.w12':
        return 'mlp.w12', 'mlp.w3'
    rows, second = shape_of(state['blocks.0.mlp.fc1.weight'])[0], state.get('blocks.0.mlp.fc2.weight')
    gated = second is not None and second.dim() == 2 and 2 * second.shape[1] == rows
    return ('mlp.fc1', 'mlp.fc2') if gated else None


def gated_width(hidden: int) -> int:
    """What mmpretrain calls ``feedforward_channels`` of a gated MLP of a width: it takes two thirds, in eights.

    Raises:
        ValueError: If no number gives the width.
    """
    width = next((w for w in (hidden * 3 // 2, -(-hidden * 3 // 2)) if (int(w * 2 / 3) + 7) // 8 * 8 == hidden), None)
    if width is None:
        raise ValueError(f"SRC must have a gated MLP of a width that 8 divides, mmpretrain's, got {hidden}.")
    return width
