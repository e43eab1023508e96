"""The configuration that loads converted weights, as Python and as text."""

from collections.abc import Mapping
from pathlib import Path

from .beside import GELU, Hints
from .convert import Converted
from .family import HALF, IMAGENET
from .sizes import Sizes, gated_width

# mmpretrain's arch -> embed_dims, num_layers, hidden, heads. Its 'small' is not the ViT-S of timm.
ARCHS = {
    'deit-tiny': (192, 12, 768, 3),
    'deit-small': (384, 12, 1536, 6),
    'base': (768, 12, 3072, 12),
    'large': (1024, 24, 4096, 16),
    'huge': (1280, 32, 5120, 16),
    'eva-g': (1408, 40, 6144, 16),
    'dinov2-giant': (1536, 40, 6144, 24),
}
# width -> heads, as published: ViT-Ti, S, B, L, H, g, G (DINOv2's g 24), SO400M, bigG
HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}
UNKNOWN = 'YOURS'


def choose_arch(sizes: Sizes, name: str | None = None, heads: int | None = None) -> str | dict:
    """The ``arch`` of mmpretrain: a known name, or a dict of sizes.

    Args:
        sizes: Of the tower, its ``hidden`` as mmpretrain counts it.
        name: That it must have; None is any.
        heads: Where they are known; else as published for the width.

    Raises:
        ValueError: If the name is another's.
    """
    if name and ARCHS[name][:3] != sizes[:3]:
        raise ValueError(
            f'--arch must match the weights (embed_dims, num_layers, hidden = {sizes[:3]}), '
            f'got {name!r} {ARCHS[name][:3]}. Without --arch it is derived.'
        )
    heads = heads or HEADS.get(sizes.embed_dims)
    named = next((k for k, v in ARCHS.items() if v == (*sizes[:3], heads)), None)
    return named or dict(
        embed_dims=sizes.embed_dims,
        num_layers=sizes.num_layers,
        num_heads=heads or UNKNOWN,
        feedforward_channels=sizes.hidden,
    )


def backbone(found: Converted, hints: Hints, dst: Path, arch: str | None = None) -> dict:
    """Config of the backbone that the tensors load into without one missing.

    Raises:
        ValueError: If ``arch`` is not that of the tensors, or heads do not divide the width.
    """
    sizes, traits = found.sizes, found.traits
    if hints.heads and sizes.embed_dims % hints.heads:
        raise ValueError(f'--num-heads must divide embed_dims {sizes.embed_dims}, got {hints.heads}.')
    counted = sizes._replace(hidden=gated_width(sizes.hidden)) if traits.swiglu else sizes
    layer = dict(act_cfg=GELU[hints.act]) if hints.act != 'gelu' else {}
    if traits.swiglu:  # with a SiLU of its own
        layer = dict(ffn_type='swiglu_fused')
    options = dict(
        num_registers=traits.registers or None,
        in_channels=None if sizes.in_channels == 3 else sizes.in_channels,
        qkv_bias=None if traits.qkv_bias else False,
        pre_norm=traits.pre_norm or None,
        patch_cfg=None if traits.patch_bias != traits.pre_norm else dict(bias=traits.patch_bias),
        layer_scale_init_value=1e-5 if traits.layer_scale else None,
        layer_cfgs=layer or None,
        final_norm=False if traits.mean_patch else None,
        out_type='avg_featmap' if traits.mean_patch else None,
    )
    return dict(
        type='mmdyt.DyTVisionTransformer',
        arch=choose_arch(counted, arch, hints.heads),
        img_size=sizes.grid * sizes.patch_size,
        patch_size=sizes.patch_size,
        **{key: value for key, value in options.items() if value is not None},
        norm_cfg=dict(type='LN', eps=hints.eps),
        init_cfg=dict(type='Pretrained', checkpoint=str(dst), prefix='backbone.'),
    )


def heads(found: Converted) -> dict[str, dict]:
    """Configs of what was converted beside the backbone, by their place in a model."""
    tensors, dim, configs = found.tensors, found.sizes.embed_dims, {}
    if (proj := tensors.get('neck.fc.weight')) is not None:
        configs['neck'] = dict(type='mmpretrain.LinearNeck', in_channels=dim, out_channels=len(proj), norm_cfg=None)
    if (head := tensors.get('head.layers.head.weight')) is not None:
        hidden = tensors.get('head.layers.pre_logits.weight')
        width = {} if hidden is None else dict(hidden_dim=len(hidden))
        configs['head'] = dict(
            type='mmpretrain.VisionTransformerClsHead', num_classes=len(head), in_channels=dim, **width
        )
    return configs


def text_of(config: object) -> str:
    """A config as it is written: ``dict(type='A', ...)``."""
    if isinstance(config, Mapping):
        return f'dict({", ".join(f"{key}={text_of(value)}" for key, value in config.items())})'
    if isinstance(config, list | tuple):
        return f'[{", ".join(map(text_of, config))}]'
    if isinstance(config, float):
        return repr(config).replace('e-0', 'e-')
    return UNKNOWN if config == UNKNOWN else repr(config)


def report(found: Converted, hints: Hints, config: dict, source: Mapping[str, str]) -> str:
    """Say what was found, what was left out, and the configuration that loads it.

    Args:
        found: What was converted.
        hints: What else is known.
        config: Of the backbone.
        source: What stood beside the weights in the checkpoint, name to reason.
    """
    sizes, head = found.sizes, found.tensors.get('head.layers.head.weight')
    known = f'heads {hints.heads}' if hints.heads else 'heads unknown (weights do not tell)'
    lines = [
        f'layout: {found.kind.name}',
        f'found: embed_dims {sizes.embed_dims}, depth {sizes.num_layers}, hidden {sizes.hidden}, {known}, '
        f'patch {sizes.patch_size}, image {config["img_size"]}, classes {"none" if head is None else len(head)}'
        + (f', read beside: {", ".join(hints.files)}' if hints.files else ''),
    ]
    left_out = {**source, **found.left_out}
    reasons = dict.fromkeys(left_out.values())
    for reason in reasons:
        names = [name for name, given in left_out.items() if given == reason]
        more = '' if len(names) < 4 else f' and {len(names) - 2} more'
        lines += [f'left out: {name} ({reason})' for name in (names if not more else names[:1])]
        lines += [f'left out: {names[1]}{more} ({reason})'] if more else []
    lines.append(f'backbone={text_of(config)}')
    lines += [f'{place}={text_of(value)}' for place, value in heads(found).items()]
    return '\n'.join([*lines, *_pixel_lines(hints)])


def _pixel_lines(hints: Hints) -> list[str]:
    if hints.pixels:
        return [_preprocessor(*hints.pixels)]
    return [
        'data_preprocessor: weights do not say how images were normalised. ImageNet (DeiT, DINO, MAE, MoCo v3):',
        _preprocessor(*IMAGENET),
        'AugReg:',
        _preprocessor(*HALF),
    ]


def _preprocessor(mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    return f'data_preprocessor={text_of(dict(mean=mean, std=std, to_rgb=True))}'
