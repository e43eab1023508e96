"""A tower of any known layout becomes mmpretrain's: every tensor of the result was looked for by name and shape."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .detect import Layout, detect
from .family import Kind
from .sizes import Sizes, Traits, gated_width, measure, shape_of

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HEAD = {'pre_logits.fc': 'head.layers.pre_logits', 'head': 'head.layers.head'}
# a tensor of the result: words of what it is made of, one behind the other, with their shapes; None is zeros
Sources = list[tuple[str | None, tuple[int, ...]]]


class Converted(NamedTuple):
    """What came of a file.

    Attributes:
        tensors: By mmpretrain's names.
        sizes: What the tensors say.
        traits: What the tower has.
        kind: What it is.
        left_out: Name to reason.
    """

    tensors: dict[str, Tensor]
    sizes: Sizes
    traits: Traits
    kind: Kind
    left_out: dict[str, str]


def convert(state: Mapping[str, object], drop_head: bool = False) -> Converted:
    """Rename the tensors of a tower after checking every one of them.

    Raises:
        ValueError: If a tensor is unknown, missing, misshapen, not floating point or not finite.
    """
    layout = detect(state)
    check_values({name: state[name] for name in layout.words})
    words = {word: _as_ours(layout, word, state[name]) for name, word in layout.words.items()}
    sizes, traits = measure(words, layout.depth, layout.kind.patch_bias)
    _check_no_rotation(layout, traits)
    words = _without_places_of_registers(words, traits)
    trunk = plan_trunk(sizes, traits)
    _check_complete(trunk, words)
    head, left_out = plan_head(words, sizes.embed_dims)
    if drop_head:
        head, left_out = {}, {word: '--drop-head' for word in words if not _in_trunk(word)}
    theirs = {word: name for name, word in layout.words.items()}
    used = {word for sources in (trunk | head).values() for word, _ in sources}
    if further := [theirs[word] for word in words if word not in used and word not in left_out]:
        raise ValueError(f'SRC must hold a ViT of equal blocks, got {further[0]!r} beside them, which not all have.')
    tensors = {target: _assemble(words, theirs, sources, target in head) for target, sources in (trunk | head).items()}
    left_out = layout.left_out | {theirs[word]: reason for word, reason in left_out.items()}
    return Converted(tensors, sizes, traits, layout.kind, left_out)


def plan_trunk(sizes: Sizes, traits: Traits) -> dict[str, Sources]:
    """What each tensor of the backbone is made of."""
    dim, depth, hidden, channels, patch, grid = sizes
    before: Sources = [] if traits.position_of else [(None, (1, 1, dim))]  # a class token without a position
    plan: dict[str, Sources] = {
        'backbone.cls_token': [('cls_token', (1, 1, dim))],
        'backbone.pos_embed': [*before, ('pos_embed', (1, grid**2 + bool(traits.position_of), dim))],
    }
    if traits.registers:
        plan['backbone.register_tokens'] = [('reg_token', (1, traits.registers, dim))]
    _add(plan, 'backbone.patch_embed.projection', 'patch_embed.proj', (dim, channels, patch, patch), traits.patch_bias)
    if traits.pre_norm:
        _add(plan, 'backbone.pre_norm', 'norm_pre', (dim,))
    _add(plan, *(('backbone.ln2', 'fc_norm') if traits.mean_patch else ('backbone.ln1', 'norm')), (dim,))
    first, second = traits.swiglu or ('mlp.fc1', 'mlp.fc2')
    ours = ('w12', 'w3') if traits.swiglu else ('layers.0.0', 'layers.1')
    for i in range(depth):
        src, dst = f'blocks.{i}.', f'backbone.layers.{i}.'
        _add(plan, f'{dst}ln1', f'{src}norm1', (dim,))
        _add_qkv(plan, f'{dst}attn.qkv', f'{src}attn.', dim, traits)
        _add(plan, f'{dst}attn.proj', f'{src}attn.proj', (dim, dim))
        _add(plan, f'{dst}ln2', f'{src}norm2', (dim,))
        _add(plan, f'{dst}ffn.{ours[0]}', f'{src}{first}', (2 * hidden if traits.swiglu else hidden, dim))
        _add(plan, f'{dst}ffn.{ours[1]}', f'{src}{second}', (dim, hidden))
        if traits.layer_scale:
            plan[f'{dst}attn.gamma1.weight'] = [(f'{src}ls1.gamma', (dim,))]
            plan[f'{dst}ffn.gamma2.weight'] = [(f'{src}ls2.gamma', (dim,))]
    if traits.swiglu:
        gated_width(hidden)
    return plan


def _add(plan: dict[str, Sources], target: str, word: str, shape: tuple[int, ...], bias: bool = True) -> None:
    plan[f'{target}.weight'] = [(f'{word}.weight', shape)]
    if bias:
        plan[f'{target}.bias'] = [(f'{word}.bias', shape[:1])]


def _add_qkv(plan: dict[str, Sources], target: str, src: str, dim: int, traits: Traits) -> None:
    """Queries, keys and values in one linear; a bias of the keys, which a softmax does not see, may be missing."""
    thirds = [f'{src}{name}' for name in 'qkv']
    whole = [(f'{src}qkv.weight', (3 * dim, dim))]
    plan[f'{target}.weight'] = [(f'{name}.weight', (dim, dim)) for name in thirds] if traits.split else whole
    if traits.qkv_bias:
        plan[f'{target}.bias'] = [(f'{name}.bias', (dim,)) for name in thirds]
        plan[f'{target}.bias'].append((f'{src}qkv.bias', (3 * dim,)))  # one or the other: see _choose_bias


def plan_head(words: Mapping[str, Tensor], dim: int) -> tuple[dict[str, Sources], dict[str, str]]:
    """What heads are made of, as :func:`plan_trunk`; and what must stay behind, word to reason."""
    plan: dict[str, Sources] = {}
    if 'proj' in words:
        rows = shape_of(words['proj'])[:1]
        plan['neck.fc.weight'] = [('proj', (*rows, dim))]
        plan['neck.fc.bias'] = [(None, rows)]  # mmpretrain's neck has one
    present = [word for word in words if word.startswith(('head.', 'pre_logits.'))]
    if not present:
        return plan, {}
    modules = [m for m in HEAD if m == 'head' or any(word.startswith(m) for word in present)]
    missing = [f'{m}.{part}' for m in modules for part in ('weight', 'bias') if f'{m}.{part}' not in words]
    if missing or not words['head.weight'].any():
        reason = f'no {missing[0]!r} beside it' if missing else 'a head of zeros, as in some in21k releases'
        return plan, dict.fromkeys(present, reason)
    for module in modules:
        rows = shape_of(words[f'{module}.weight'])[:1]
        plan[f'{HEAD[module]}.weight'] = [(f'{module}.weight', (*rows, dim))]
        plan[f'{HEAD[module]}.bias'] = [(f'{module}.bias', rows)]
        (dim,) = rows or (dim,)
    return plan, {}


def _check_no_rotation(layout: Layout, traits: Traits) -> None:
    """Refuse where RoPE may be: it leaves no tensor, but its models have names that few others have together."""
    old_scale = any(name.endswith('.gamma_1') for name in layout.words)
    third_less = any(name.endswith('.q_bias') for name in layout.words)
    if (third_less and traits.swiglu) or (old_scale and not third_less and traits.position_of):
        raise ValueError(
            'SRC must hold a ViT that adds its positions, got the tensors that EVA-02 and ViTs with RoPE have, which '
            "turn queries and keys by their place. mmpretrain's VisionTransformer does not: use DINOv2 or DeiT III."
        )


def _in_trunk(word: str) -> bool:
    return not word.startswith(('head.', 'pre_logits.')) and word != 'proj'


def check_values(state: Mapping[str, object]) -> None:
    """Refuse values that are not the weights of a float model."""
    for name, value in state.items():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        if kind not in FLOATS or value.layout != torch.strided or value.is_meta:
            raise ValueError(
                f'{name} must be a dense tensor of float16, bfloat16, float32 or float64, '
                f'got {kind}. Save the state_dict() of the float model.'
            )


def _as_ours(layout: Layout, word: str, tensor: Tensor) -> Tensor:
    """With the dimensions that ours has."""
    for _ in range(layout.family.lifts.get(word, 0)):
        tensor = tensor[None]
    return tensor.T if word in layout.family.turned and tensor.dim() == 2 else tensor


def _without_places_of_registers(words: dict[str, Tensor], traits: Traits) -> dict[str, Tensor]:
    """Positions of registers, which some of timm's models have, go into the registers."""
    if traits.position_of <= 1:
        return words
    places, last = words['pos_embed'], traits.position_of
    if shape_of(words['reg_token']) != (*shape_of(places[:, 1:last]),):
        raise ValueError(
            f'reg_token must have shape {shape_of(places[:, 1:last])}, got {shape_of(words["reg_token"])}.'
        )
    registers = words['reg_token'] + places[:, 1:last]
    return words | dict(reg_token=registers, pos_embed=torch.cat([places[:, :1], places[:, last:]], dim=1))


def _check_complete(plan: dict[str, Sources], words: Mapping[str, Tensor]) -> None:
    """Settle which form of bias each block has, then refuse a trunk that lacks a tensor."""
    for target, sources in plan.items():
        if target.endswith('attn.qkv.bias'):
            plan[target] = _choose_bias(sources, words)
    wanted = [word for sources in plan.values() for word, _ in sources if word]
    if missing := [word for word in wanted if word not in words]:
        raise ValueError(
            f'SRC must hold all {len(wanted)} tensors of this trunk, got {len(missing)} fewer, '
            f'first {missing[0]!r}. Fetch the file again.'
        )


def _choose_bias(sources: Sources, words: Mapping[str, Tensor]) -> Sources:
    """A bias for all three, or for each, that of the keys being zero where it is missing."""
    *(thirds), whole = sources
    if whole[0] in words or not any(word in words for word, _ in thirds):
        return [whole]
    keys = any(word.endswith('attn.k.bias') for word in words)  # else no block has one: it is zero
    return [(None if i == 1 and not keys else word, shape) for i, (word, shape) in enumerate(thirds)]


def _assemble(words: Mapping[str, Tensor], theirs: Mapping[str, str], sources: Sources, head: bool) -> Tensor:
    """One tensor of the result, checked."""
    like = next((words[word] for word, _ in sources if word), next(iter(words.values())))
    parts = []
    for word, shape in sources:
        tensor = like.new_zeros(shape) if word is None else words[word]  # None: what ours has, and theirs has not
        if shape_of(tensor) != shape:
            remedy = ' --drop-head leaves the head out.' if head else ''
            raise ValueError(f'{theirs[word]} must have shape {shape}, got {shape_of(tensor)}.{remedy}')
        if not tensor.isfinite().all():
            raise ValueError(f'{theirs[word]} must be finite, got NaN or infinity. Fetch the file again.')
        parts.append(tensor.detach())
    # A copy, since a view would bring its whole storage into DST.
    joined = torch.cat(parts, dim=1 if parts[0].dim() == 3 else 0) if len(parts) > 1 else parts[0]
    return joined.clone(memory_format=torch.contiguous_format)
