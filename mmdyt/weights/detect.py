"""Which layout a file has, and what is no layout of ours: refused by name, with the reason."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from .families import FAMILIES
from .family import Family, Kind

# What names give away that none of the tables has, the most telling first.
RELATIVES = {
    r'^layers\.[0-9]+\.(blocks|downsample)': 'Hierarchical models such as Swin are no plain ViT.',
    r'rope|rotary|storage_tokens|bias_mask|^(model\.)?layer\.[0-9]+\.(layer_scale1|mlp\.up_proj)': (
        "DINOv3 and EVA-02 turn queries and keys by their place (RoPE), which mmpretrain's VisionTransformer does not: "
        'use DINOv2.'
    ),
    r'relative_position|rel_pos': (
        'BEiT adds a bias for each pair of places to its attention, which mmpretrain has in BEiTViT alone and parts '
        'cannot be added to: use MAE or DINOv2.'
    ),
    r'^backbone\.': "Names in 'backbone.' are mmpretrain's own: such a file needs no conversion.",
    r'dist(illation)?_token': 'This is a distilled DeiT: use the DeiT without distillation.',
    r'q_norm\.|k_norm\.|q_layernorm': "mmpretrain's VisionTransformer has no query-key normalisation.",
    r'attn_pool|attentional_pool|head\.(attention|probe)': (
        'SigLIP and CoCa read patches by attention, not by a class token: use CLIP.'
    ),
    r'mlp\.norm\.|ffn_ln|inner_attn_ln|attn\.norm\.': (
        'Norms within branches, as EVA-02 has them, are in no plain ViT: use DINOv2.'
    ),
    r'^layers\.': 'Hierarchical models such as Swin are no plain ViT.',
    r'^features\.|^layer[1-4]\.': 'This is a convolutional network, or Swin, no plain ViT.',
    r'': 'docs/weights.md lists the layouts; AugReg ViT, DINOv2, MAE and CLIP are among them.',
}


class Layout(NamedTuple):
    """Where the tower is in a file.

    Attributes:
        family: Whose names it has.
        prefix: What stands in front of them.
        kind: What it is.
        words: Names of the file to our words.
        left_out: Names of what stays behind to the reason.
        depth: Number of blocks.
    """

    family: Family
    prefix: str
    kind: Kind
    words: dict[str, str]
    left_out: dict[str, str]
    depth: int


def detect(names: Iterable[str]) -> Layout:
    """Find the layout by the names alone.

    Raises:
        ValueError: If there is none, a name is unknown, two stand for one tensor, or a block is missing.
    """
    names = list(names)
    family, prefix, words = max(_candidates(names), key=lambda found: _score(found[2]))
    if not any(word.startswith('blocks.') for word in words.values()):
        raise _refusal(names, names)
    others = [name for name in names if name not in words]
    left_out = {name: reason for name in others if (reason := family.reason_to_leave(name))}
    if unknown := [name for name in others if name not in left_out]:
        raise _refusal(unknown, names)
    if len(set(words.values())) < len(words):
        twice = next(name for name in words if list(words.values()).count(words[name]) > 1)
        raise ValueError(f'SRC must hold each tensor under one name, got two for that of {twice!r}. Fetch it again.')
    return Layout(family, prefix, _kind(family, names), words, left_out, _depth(family, words))


def _candidates(names: list[str]) -> Iterable[tuple[Family, str, dict[str, str]]]:
    """Every table behind every prefix, with what it knows of the names."""
    return [(family, prefix, family.words(names, prefix)) for family in FAMILIES for prefix in family.prefixes]


def _score(words: dict[str, str]) -> tuple[bool, int]:
    """A tower has a patch embedding: a text tower beside it may be deeper, but has none."""
    return 'patch_embed.proj.weight' in words.values(), len(words)


def _kind(family: Family, names: list[str]) -> Kind:
    found = (kind for pattern, kind in family.kinds.items() if any(re.search(pattern, name) for name in names))
    return next(found, family.kind)


def _depth(family: Family, words: dict[str, str]) -> int:
    """Number of blocks, which must go from 0 without a gap."""
    blocks = {int(word.split('.')[1]) for word in words.values() if word.startswith('blocks.')}
    gap = next(i for i in range(len(blocks) + 1) if i not in blocks)
    if gap < len(blocks):
        raise ValueError(
            f'SRC must number its blocks from 0 without a gap, got {len(blocks)} without '
            f"'blocks.{gap}'. Fetch the file again."
        )
    return len(blocks)


def _refusal(unknown: list[str], names: list[str]) -> ValueError:
    hint = next(v for pattern, v in RELATIVES.items() if not pattern or any(re.search(pattern, k) for k in unknown))
    first = f', first {unknown[0]!r}' if unknown else ''
    return ValueError(
        f'SRC must hold only the tensors of a plain ViT in a known layout, got {len(unknown)} others of {len(names)}'
        f'{first}. {hint}'
    )
