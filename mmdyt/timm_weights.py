"""Weights of a plain ViT under timm's names become those of mmpretrain's; on torch alone.

What is no plain ViT is refused: every tensor of the result was looked for by name and shape.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch

WRAPPERS = ('model', 'state_dict', 'model_ema')
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# mmpretrain's arch -> embed_dims, num_layers, hidden. Its 'small' is not the ViT-S of timm.
ARCHS = {
    'deit-tiny': (192, 12, 768),
    'deit-small': (384, 12, 1536),
    'base': (768, 12, 3072),
    'large': (1024, 24, 4096),
}
BLOCK = re.compile(r'^blocks\.(0|[1-9][0-9]{0,3})\.')
HEAD = {'pre_logits.fc': 'head.layers.pre_logits', 'head': 'head.layers.head'}
HEAD_NAMES = {f'{module}.{part}' for module in (*HEAD, 'head_dist') for part in ('weight', 'bias')}
# What an unknown name gives away, most telling first.
RELATIVES = {
    r'^backbone\.': "Names in 'backbone.' are mmpretrain's own: such a file needs no conversion.",
    r'dist_token': 'This is a distilled DeiT: use the DeiT without distillation.',
    r'reg_token|register_tokens': "mmpretrain's VisionTransformer has no register tokens.",
    r'\.ls1\b|\.gamma_1\b': 'Layer scale (DINOv2, DeiT III, CaiT) is outside this converter.',
    r'\.q_norm\.': "mmpretrain's VisionTransformer has no query-key normalisation.",
    r'^layers\.': 'Hierarchical models such as Swin are no plain ViT.',
    r'': 'Use AugReg ViT weights, or DeiT without distillation.',
}


class Sizes(NamedTuple):
    """What the tensors say. The number of heads leaves no trace in them."""

    embed_dims: int
    num_layers: int
    hidden: int
    in_channels: int
    patch_size: int
    grid: int


def unwrap(checkpoint):
    """Take the state dict out of `{'model': ...}` and the like, and off the prefix 'module.'.

    Returns:
        tuple[dict, dict]: the tensors by name; what was left out, name to reason.
    """
    left_out = {}
    for _ in range(3):  # bounded: a pickled dict may hold itself
        inner = checkpoint if isinstance(checkpoint, Mapping) else {}
        key = next((k for k in WRAPPERS if isinstance(inner.get(k), Mapping)), None)
        if key is None:
            break
        left_out.update({str(k): f'stands beside {key!r}, which is taken' for k in checkpoint if k != key})
        checkpoint = checkpoint[key]
    if not isinstance(checkpoint, Mapping) or not all(isinstance(k, str) for k in checkpoint):
        raise ValueError(
            f'SRC must hold a state dict (names to tensors), got a {type(checkpoint).__name__}. '
            'Save model.state_dict() instead.'
        )
    if all(k.startswith('module.') for k in checkpoint):
        checkpoint = {k.removeprefix('module.'): v for k, v in checkpoint.items()}
    return dict(checkpoint), left_out


def plan_trunk(sizes):
    """Where each tensor of the trunk goes: timm's name to (mmpretrain's name, shape)."""
    dim, depth, hidden, channels, patch, grid = sizes
    plan = {
        'cls_token': ('backbone.cls_token', (1, 1, dim)),
        'pos_embed': ('backbone.pos_embed', (1, grid**2 + 1, dim)),
    }
    modules = {
        'patch_embed.proj': ('backbone.patch_embed.projection', (dim, channels, patch, patch)),
        'norm': ('backbone.ln1', (dim,)),
    }
    for i in range(depth):
        src, dst = f'blocks.{i}', f'backbone.layers.{i}'
        modules[f'{src}.norm1'] = (f'{dst}.ln1', (dim,))
        modules[f'{src}.attn.qkv'] = (f'{dst}.attn.qkv', (3 * dim, dim))
        modules[f'{src}.attn.proj'] = (f'{dst}.attn.proj', (dim, dim))
        modules[f'{src}.norm2'] = (f'{dst}.ln2', (dim,))
        modules[f'{src}.mlp.fc1'] = (f'{dst}.ffn.layers.0.0', (hidden, dim))
        modules[f'{src}.mlp.fc2'] = (f'{dst}.ffn.layers.1', (dim, hidden))
    for name, (target, shape) in modules.items():
        plan[f'{name}.weight'] = (f'{target}.weight', shape)
        plan[f'{name}.bias'] = (f'{target}.bias', shape[:1])
    return plan


def plan_head(state, dim):
    """Where the head goes, as `plan_trunk`; and what must stay behind, name to reason."""
    present = [k for k in state if k in HEAD_NAMES]
    left_out = {k: 'distillation head' for k in present if k.startswith('head_dist.')}
    modules = [m for m in HEAD if m == 'head' or any(k.startswith(m) for k in present)]
    missing = [f'{m}.{part}' for m in modules for part in ('weight', 'bias') if f'{m}.{part}' not in state]
    if missing or not state['head.weight'].any():
        reason = f'no {missing[0]!r} beside it' if missing else 'a head of zeros, as in some in21k releases'
        return {}, {k: reason for k in present} | left_out
    plan = {}
    for module in modules:
        rows = shape_of(state[f'{module}.weight'])[:1]
        plan[f'{module}.weight'] = (f'{HEAD[module]}.weight', (*rows, dim))
        plan[f'{module}.bias'] = (f'{HEAD[module]}.bias', rows)
        (dim,) = rows or (dim,)
    return plan, left_out


def shape_of(tensor):
    return tuple(tensor.shape)


def check_values(state):
    """Refuse values that are not the weights of a float model."""
    for name, value in state.items():
        kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        if kind not in FLOATS or value.layout != torch.strided or value.is_meta:
            raise ValueError(
                f'{name} must be a dense tensor of float16, bfloat16, float32 or float64, '
                f'got {kind}. Save the state_dict() of the float model.'
            )


def check_names(state):
    """Refuse what is no plain ViT; return the number of blocks."""
    known = plan_trunk(Sizes(1, 1, 1, 1, 1, 1)).keys() | HEAD_NAMES
    unknown = [k for k in state if BLOCK.sub('blocks.0.', k) not in known]
    if unknown:
        hint = next(v for pattern, v in RELATIVES.items() if any(re.search(pattern, k) for k in unknown))
        raise ValueError(
            "SRC must hold only the tensors of a plain ViT under timm's names, "
            f'got {len(unknown)} others of {len(state)}, first {unknown[0]!r}. {hint}'
        )
    blocks = {int(m[1]) for m in map(BLOCK.match, state) if m}
    gap = next(i for i in range(len(blocks) + 1) if i not in blocks)
    if not blocks or gap < len(blocks):
        raise ValueError(
            f'SRC must number its blocks from 0 without a gap, got {len(blocks)} without '
            f"'blocks.{gap}'. Fetch the file again."
        )
    return len(blocks)


def measure(state, depth):
    """Read the sizes of the trunk from three of its tensors."""
    shapes = []
    for name, ndim in (('patch_embed.proj.weight', 4), ('pos_embed', 3), ('blocks.0.mlp.fc1.weight', 2)):
        if name not in state:
            raise ValueError(f'SRC must hold {name!r}, got {len(state)} others. Fetch the file again.')
        shapes.append(shape_of(state[name]))
        if len(shapes[-1]) != ndim or 0 in shapes[-1]:
            raise ValueError(f'{name} must have {ndim} dimensions, none empty, got shape {shapes[-1]}.')
    (dim, channels, patch, width), (_, tokens, _), (hidden, _) = shapes
    grid = math.isqrt(tokens - 1)
    if patch != width:
        raise ValueError(f'patch_embed.proj.weight must have square patches, got {patch} x {width}.')
    if not grid or grid**2 != tokens - 1:
        raise ValueError(
            f'pos_embed must hold one class token and a square grid, got {tokens} positions. '
            'Oblong images and further prefix tokens are outside this converter.'
        )
    return Sizes(dim, depth, hidden, channels, patch, grid)


def convert(state, drop_head=False):
    """Rename a timm ViT's tensors after checking every one of them.

    Returns:
        tuple[dict, Sizes, dict]: the tensors under mmpretrain's names; the sizes; what was left out, name to
            reason.

    Raises:
        ValueError: if a tensor is unknown, missing, misshapen, not floating point or not finite.
    """
    depth = check_names(state)
    check_values(state)
    sizes = measure(state, depth)
    plan = plan_trunk(sizes)
    if missing := [k for k in plan if k not in state]:
        raise ValueError(
            f'SRC must hold all {len(plan)} tensors of this trunk, got {len(missing)} fewer, '
            f'first {missing[0]!r}. Fetch the file again.'
        )
    head, left_out = plan_head(state, sizes.embed_dims)
    if drop_head:
        head, left_out = {}, {k: '--drop-head' for k in state if k not in plan}
    converted = {}
    for name, (target, shape) in (plan | head).items():
        tensor = state[name]
        if shape_of(tensor) != shape:
            remedy = ' --drop-head leaves the head out.' if name in head else ''
            raise ValueError(f'{name} must have shape {shape}, got {shape_of(tensor)}.{remedy}')
        if not tensor.isfinite().all():
            raise ValueError(f'{name} must be finite, got NaN or infinity. Fetch the file again.')
        # A clone, since a view would bring its whole storage into DST.
        converted[target] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return converted, sizes, left_out


def choose_arch(sizes, name=None):
    """Choose mmpretrain's `arch`: a known name, which must be the one asked for, or a dict to complete."""
    if name and ARCHS[name] != sizes[:3]:
        raise ValueError(
            f'--arch must match the weights (embed_dims, num_layers, hidden = {sizes[:3]}), '
            f'got {name!r} {ARCHS[name]}. Without --arch it is derived.'
        )
    named = next((k for k, v in ARCHS.items() if v == sizes[:3]), None)
    return (
        repr(named)
        if named
        else (
            f'dict(embed_dims={sizes.embed_dims}, num_layers={sizes.num_layers}, '
            f'num_heads=YOURS, feedforward_channels={sizes.hidden})'
        )
    )
