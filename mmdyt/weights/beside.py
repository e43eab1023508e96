"""What stands in files beside the weights: heads, activation, pixels, which the weights themselves do not say."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .family import Kind
from .reading import read_json
from .sizes import Sizes

GELU = {
    'gelu': dict(type='GELU'),
    'quick_gelu': dict(type='mmpretrain.QuickGELU'),
    'gelu_tanh': dict(type='GELU', approximate='tanh'),
}
ROTARY = ('rope', 'eva02', 'dinov3', '_pe_')  # in timm's names of models that turn queries and keys by their place
SAME = dict(gelu_new='gelu_tanh', gelu_pytorch_tanh='gelu_tanh', gelu_fast='gelu_tanh')


class Hints(NamedTuple):
    """What is known beside the tensors.

    Attributes:
        act: One of :data:`GELU`; None where nobody says.
        heads: Of attention.
        eps: Of the layer norms.
        pixels: Means and standard deviations, of values from 0 to 255.
        files: Those that said it.
    """

    act: str | None = None
    heads: int | None = None
    eps: float | None = None
    pixels: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    files: tuple[str, ...] = ()


def look_beside(src: Path, sizes: Sizes) -> Hints:
    """Read what Hugging Face, timm and OpenCLIP publish beside weights, if it is of a tower of these sizes.

    Raises:
        ValueError: If they name an activation that no ViT of ours has, or a model with RoPE.
    """
    hints = Hints()
    for name, read in (('config.json', _config), ('open_clip_config.json', _open_clip)):
        found = read(read_json(src.with_name(name)), sizes)
        if found != Hints():
            hints = _joined(hints, found._replace(files=(name,)))
    pixels = _pixels(read_json(src.with_name('preprocessor_config.json')), 'image_mean', 'image_std')
    if pixels and hints.files:  # which alone does not say whose it is
        hints = hints._replace(pixels=pixels, files=(*hints.files, 'preprocessor_config.json'))
    return hints


def settle(hints: Hints, kind: Kind, act: str | None, heads: int | None) -> Hints:
    """What holds in the end: what the user says, then what stands beside, then what is usual.

    Raises:
        ValueError: If nobody says which of CLIP's two activations it is.
    """
    act = act or hints.act or ('gelu' if kind.gelu else None)
    if act is None:
        raise ValueError(
            '--act must say which GELU this CLIP was trained with, since weights do not: quick_gelu for those of '
            'OpenAI, gelu for most of OpenCLIP (LAION, DataComp). A config.json beside SRC would say it.'
        )
    return hints._replace(
        act=act,
        heads=heads or hints.heads or kind.heads,
        eps=hints.eps or kind.eps,
        pixels=hints.pixels or kind.pixels,
    )


def _config(config: Mapping, sizes: Sizes) -> Hints:
    """Of Hugging Face's transformers, or of timm."""
    if isinstance(config.get('architecture'), str):  # timm's
        name = config['architecture']
        if found := next((word for word in ROTARY if word in name), None):
            raise ValueError(f'SRC must be no ViT with RoPE, got {name!r} by the config.json beside it ({found!r}).')
        quick = 'quickgelu' in name
        pixels = _pixels(config.get('pretrained_cfg', {}), 'mean', 'std')
        fits = config.get('num_features', sizes.embed_dims) == sizes.embed_dims
        return Hints(act='quick_gelu' if quick else 'gelu', pixels=pixels) if fits else Hints()
    tower = config.get('vision_config', config)
    if not isinstance(tower, Mapping):
        return Hints()
    if (tower.get('hidden_size'), tower.get('num_hidden_layers')) != sizes[:2]:
        return Hints()
    act = tower.get('hidden_act')
    act = SAME.get(act, act)
    if act is not None and act not in GELU:
        raise ValueError(f'config.json must name an activation among {sorted(GELU)}, got {act!r}.')
    heads, eps = tower.get('num_attention_heads'), tower.get('layer_norm_eps')
    return Hints(act, heads if _divides(heads, sizes) else None, eps if isinstance(eps, float) else None)


def _open_clip(config: Mapping, sizes: Sizes) -> Hints:
    model = config.get('model_cfg')
    tower = model.get('vision_cfg') if isinstance(model, Mapping) else None
    if not isinstance(tower, Mapping) or (tower.get('width'), tower.get('layers')) != sizes[:2]:
        return Hints()
    width = tower.get('head_width', 64)
    heads = sizes.embed_dims // width if isinstance(width, int) and width > 0 else None
    pixels = _pixels(config.get('preprocess_cfg', {}), 'mean', 'std')
    act = 'quick_gelu' if model.get('quick_gelu') else 'gelu'
    return Hints(act, heads if _divides(heads, sizes) else None, None, pixels)


def _divides(heads: object, sizes: Sizes) -> bool:
    return isinstance(heads, int) and heads > 0 and sizes.embed_dims % heads == 0


def _pixels(config: object, mean: str, std: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Three means and deviations, published for values from 0 to 1."""
    found = tuple(config.get(key) for key in (mean, std)) if isinstance(config, Mapping) else (None, None)
    numbers = all(
        isinstance(v, list | tuple) and len(v) == 3 and all(isinstance(x, int | float) for x in v) for v in found
    )
    return tuple(tuple(round(255 * x, 6) for x in values) for values in found) if numbers else None


def _joined(first: Hints, second: Hints) -> Hints:
    """The first where it says something, and all files."""
    said = [a if a is not None else b for a, b in zip(first[:-1], second[:-1], strict=True)]
    return Hints(*said, (*first.files, *second.files))
