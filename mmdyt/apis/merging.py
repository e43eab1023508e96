"""A checkpoint with its rewrites folded into the frozen weights, and the config that goes with it."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor

from mmdyt.core.part import Rewrite, parts
from mmdyt.core.tuning import merge
from mmdyt.models import DyTVisionTransformer
from mmdyt.models.part_configs import part_class
from mmdyt.tuned.model import methods

from .prediction import Prediction
from .predictor import Predictor

TOLERANCE = 1e-4  # of the largest feature of an input
BIASES = dict(qkv_bias='layers.0.attn.qkv')  # arguments of mmpretrain's ViT, and modules that may have got a bias


@dataclass
class Merged:
    """What merging did.

    Attributes:
        folded: Kinds of parts that are gone, with their numbers.
        left: Kinds of parts that stay.
        config: Of the merged model.
    """

    folded: dict[str, int]
    left: dict[str, int]
    config: Config


def merge_model(host: nn.Module, cfg: Config) -> Merged:
    """Fold what merges into the frozen weights of a model.

    Args:
        host: Changed in place.
        cfg: Its whole config; stays as it is.

    Raises:
        ValueError: If there is nothing to fold, or a rewrite stays, which no config could say.
    """
    before = methods(host)
    stay = merge(host)
    left = methods(host)
    folded = {label: number - left.get(label, 0) for label, number in before.items() if number > left.get(label, 0)}
    if stay:
        raise ValueError(f'model must have rewrites that all merge, got others at {", ".join(stay[:3])}.')
    if not folded:
        raise ValueError(f'model must have rewrites to merge, such as those of LoRA, got {left or "no parts"}.')
    return Merged(folded, left, _without_rewrites(cfg, host))


def _without_rewrites(cfg: Config, host: nn.Module) -> Config:
    """The config of a merged model: no rewrites, no pre-trained base, nothing said of what is tuned."""
    cfg = copy.deepcopy(cfg)
    backbone = cfg.model.backbone
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        kept = [config for config in backbone.get('parts') or [] if not issubclass(part_class(config), Rewrite)]
    backbone.parts = kept or None
    for key in ('init_cfg', 'tuned'):
        backbone.pop(key, None)
    for argument, place in BIASES.items():
        if backbone.get(argument) is False and host.backbone.get_submodule(place).bias is not None:
            backbone[argument] = True
    cfg.load_from, cfg.resume = None, False
    return cfg


def plain_backbone(host: nn.Module, backbone: Mapping) -> dict:
    """The config of mmpretrain's own ``VisionTransformer`` that a merged model without parts is.

    Raises:
        ValueError: If parts are left.
    """
    left = methods(host)
    if left:
        words = ', '.join(f'{number} {label}' for label, number in left.items())
        raise ValueError(f'--strip must find a model without parts, got {words} left.')
    own = {name for name, p in inspect.signature(DyTVisionTransformer).parameters.items() if p.kind == p.KEYWORD_ONLY}
    stock = dict(backbone, type='mmpretrain.VisionTransformer')
    return {key: value for key, value in stock.items() if key not in own}


def check_plain(host: nn.Module, plain: Mapping, images: Sequence[Tensor]) -> float:
    """Load a merged model's weights into a stock backbone, and compare features.

    Args:
        host: Merged.
        plain: From :func:`plain_backbone`.
        images: What the backbone is given, (B, 3, H, W) or (B, 3, T, H, W) each.

    Returns:
        The largest difference, of the largest feature.
    """
    stock = MODELS.build(dict(plain))
    stock.eval()  # of which mmpretrain's returns nothing
    stock.load_state_dict(host.backbone.state_dict())
    worst = 0.0
    with torch.no_grad():
        for image in images:
            image = image if image.dim() == 4 else image.transpose(1, 2).flatten(0, 1)
            worst = max(worst, difference(_flat(stock(image)), _flat(host.backbone(image))))
    return worst


class Watched:
    """Predictions of inputs, one after the other, with what the backbone was given and gave.

    Attributes:
        predictions: Of the inputs.
        features: All of each input in one tensor.
        images: What the backbone was given for each input, of its first pass.
    """

    def __init__(self, model: Predictor, inputs: Sequence):
        self.predictions: list[Prediction] = []
        self.features: list[Tensor] = []
        self.images: list[Tensor] = []
        seen: list[tuple[Tensor, Tensor]] = []
        keep = model.host.backbone.register_forward_hook(
            lambda module, args, output: seen.append((args[0], _flat(output)))
        )
        try:
            for one in inputs:
                seen.clear()
                self.predictions.append(model(one))
                self.features.append(torch.cat([features for _, features in seen]))
                self.images.append(seen[0][0])
        finally:
            keep.remove()


def compare(one: Watched, other: Watched) -> tuple[float, list[int]]:
    """How far two models are apart on the same inputs.

    Returns:
        The largest difference of features, of the largest feature, on inputs whose tokens ran alike; and the others,
        where rounding decided which token runs.
    """
    worst, flipped = 0.0, []
    pairs = zip(one.predictions, other.predictions, one.features, other.features, strict=True)
    for i, (first, second, before, after) in enumerate(pairs):
        if first.tokens is not None and not np.array_equal(first.tokens, second.tokens):
            flipped.append(i)
        else:
            worst = max(worst, difference(before, after))
    return worst, flipped


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, of the largest value."""
    if one.shape != other.shape:
        return float('inf')
    return float((one - other).abs().max() / one.abs().max().clamp(min=torch.finfo(one.dtype).tiny))


def parameters_of_parts(host: nn.Module) -> int:
    """How many numbers the parts of a model hold."""
    return sum(parameter.numel() for part in parts(host) for parameter in part.parameters(recurse=True))


def random_inputs(model: Predictor, number: int, size: tuple[int, int]) -> list[np.ndarray]:
    """Noise in 8 bits: images (H, W, 3), or clips (64, H, W, 3)."""
    draw = np.random.default_rng(0)
    shape = (64, *size, 3) if model.video else (*size, 3)
    return [draw.integers(0, 256, shape, np.uint8) for _ in range(number)]


def save(host: nn.Module, meta: Mapping, path: Path) -> None:
    """Write a whole checkpoint."""
    state = {name: tensor.cpu() for name, tensor in host.state_dict().items()}
    torch.save(dict(state_dict=state, meta=dict(meta)), path)


def _flat(output) -> Tensor:
    """All tensors of an output in one."""
    if isinstance(output, Tensor):
        return output.flatten()
    return torch.cat([_flat(one) for one in output])
