"""Necks that adapt the features of a frozen backbone before the head reads them. B images, N tokens, C width."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from types import MappingProxyType

import torch.nn as nn
from mmengine.model import BaseModule, ModuleList
from torch import Tensor

from mmdyt.core.options import is_integer
from mmdyt.registry import MODELS

ADAPTER = MappingProxyType(dict(type='mmdyt.MoEAdapter'))
PYRAMIDS = ([4, 2, 1, 0.5], [2, 1, 0.5, 0.25])  # mmseg's Feature2Pyramid knows no others, and ignores their order


class AdaptedLevel(BaseModule):
    """Features of one level plus their update by an adapter, whatever their shape.

    Args:
        adapter: Maps tokens (B, N, C) to their updates.
    """

    def __init__(self, adapter: nn.Module):
        super().__init__()
        self.adapter = adapter

    def init_weights(self) -> None:
        """Undo what an ``init_cfg`` on ``Linear`` did to the adapter; a checkpoint of the neck loads afterwards."""
        super().init_weights()
        self.adapter.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C), (B, N, C) or (B, C, H, W) -> the same."""
        if x.dim() == 2:
            return x + self.adapter(x[:, None])[:, 0]
        if x.dim() == 3:
            return x + self.adapter(x)
        update = self.adapter(x.flatten(2).transpose(1, 2))  # (B, H * W, C)
        return (x + update.transpose(1, 2).unflatten(2, x.shape[2:])).contiguous()


@MODELS.register_module()
class MoEAdapterNeck(BaseModule):
    """Adapts each level of a frozen backbone's features with a mixture-of-experts adapter of its own.

    The backbone stays as it is and needs no gradients; fresh adapters change nothing, so training starts from the
    pre-trained features. The mixture is chosen per image and level, from the mean of the level's tokens. The adapter
    is that of Dynamic Tuning (arXiv 2403.11808), eq. (7).  # differs from paper: it is put behind the backbone.

    Args:
        in_channels: Width of each level the backbone returns; a number is one level.
        adapter: Config of the adapter of each level; ``dim`` is filled in. ``type='mmdyt.Adapter'`` is one without
            experts, for comparison.
        rescales: Turn the adapted maps of equal width into a pyramid, as ``UPerHead`` wants it, with mmseg's
            ``Feature2Pyramid``: one factor per level, [4, 2, 1, 0.5] or [2, 1, 0.5, 0.25]. None keeps their sizes.
        norm_cfg: Config of the pyramid's normalisation; None is mmseg's choice.
        init_cfg: As in any mmengine module.

    Shape:
        Tuple with an entry (B, C), (B, N, C) or (B, C, H, W) per level -> tuple of the same shapes. (B, C) is one
        token, (B, C, H, W) is H * W tokens. With ``rescales``: (B, C, H, W) -> (B, C, factor * H, factor * W).

    Raises:
        ImportError: If there are ``rescales``, but no mmsegmentation.
        ValueError: If an argument is out of range, or features are not what ``in_channels`` promised.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        adapter: Mapping = ADAPTER,
        rescales: Sequence[float] | None = None,
        norm_cfg: Mapping | None = None,
        init_cfg: Mapping | Sequence[Mapping] | None = None,
    ):
        super().__init__(init_cfg)
        widths = _per_level(in_channels)
        if not widths or not all(is_integer(width) and width >= 1 for width in widths):
            raise ValueError(f'in_channels must hold a positive integer per level, got {in_channels!r}.')
        if not isinstance(adapter, Mapping):
            raise ValueError(f'adapter must be a config, got {adapter!r}. Without adapters, leave out the neck.')
        if norm_cfg is not None and rescales is None:
            raise ValueError(f'norm_cfg must be None without rescales, whose pyramid it is for, got {norm_cfg}.')
        self.in_channels = widths
        self.levels = ModuleList(
            AdaptedLevel(MODELS.build(ADAPTER | adapter | dict(dim=width))) for width in self.in_channels
        )
        self.pyramid = None if rescales is None else self._build_pyramid(_per_level(rescales), norm_cfg)

    def _build_pyramid(self, rescales: list[float], norm_cfg: Mapping | None) -> nn.Module:
        """The ``Feature2Pyramid`` of mmseg, for the levels at hand."""
        if len(rescales) != len(self.in_channels):
            raise ValueError(
                f'rescales must hold a factor per level, got {rescales} for the {len(self.in_channels)} levels of '
                f'in_channels {self.in_channels}.'
            )
        if rescales not in PYRAMIDS:
            raise ValueError(f'rescales must be {PYRAMIDS[0]} or {PYRAMIDS[1]}, got {rescales}.')
        if len(set(self.in_channels)) > 1:
            raise ValueError(f'in_channels must be equal for a pyramid with rescales, got {self.in_channels}.')
        if find_spec('mmseg') is None:
            raise ImportError(
                f'rescales must be None without mmsegmentation, whose Feature2Pyramid it needs, got {rescales}. '
                'Install it: `pip install mmsegmentation`.'
            )
        options = {} if norm_cfg is None else dict(norm_cfg=norm_cfg)
        embed_dim = self.in_channels[0]
        return MODELS.build(dict(type='mmseg.Feature2Pyramid', embed_dim=embed_dim, rescales=rescales, **options))

    def forward(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Adapt the features of each level, and rescale them if asked to."""
        self._check(features)
        features = tuple(level(x) for level, x in zip(self.levels, features, strict=True))
        return features if self.pyramid is None else self.pyramid(features)

    @property
    def scales(self) -> list[float]:
        """The factor of each level's sides."""
        return level_factors(self.pyramid, len(self.levels))

    def _check(self, features: tuple[Tensor, ...]) -> None:
        """Refuse what ``in_channels`` did not promise."""
        if not isinstance(features, list | tuple):
            raise ValueError(f'features must be a tuple with a tensor per level, got a {type(features).__name__}.')
        if len(features) != len(self.in_channels):
            raise ValueError(
                f'features must have {len(self.in_channels)} levels, as in_channels {self.in_channels} says, got '
                f"{len(features)}. They are the backbone's out_indices."
            )
        for i, (x, width) in enumerate(zip(features, self.in_channels, strict=True)):
            if self.pyramid is not None and x.dim() != 4:
                raise ValueError(
                    f'features[{i}] must be maps (B, C, H, W) for a pyramid with rescales, got shape '
                    f"{tuple(x.shape)}. ViTs return maps with out_type='featmap'."
                )
            if x.dim() not in (2, 3, 4):
                raise ValueError(
                    f'features[{i}] must be (B, C), (B, N, C) or (B, C, H, W), got shape {tuple(x.shape)}.'
                )
            if x.shape[2 if x.dim() == 3 else 1] != width:
                raise ValueError(
                    f'features[{i}] must have {width} channels, as in_channels says, got shape {tuple(x.shape)}.'
                )


def level_factors(neck: nn.Module | None, levels: int) -> list[float]:
    """By which factors a neck resizes the sides of a backbone's levels, one for each level behind it.

    Args:
        neck: Of mmseg (``Feature2Pyramid``, ``MultiLevelNeck``) or of this package; None resizes nothing.
        levels: Of the backbone.

    Raises:
        ValueError: If the neck does not tell, or tells another number of levels.
    """
    if neck is None:
        return [1.0] * levels
    if hasattr(neck, 'rescales'):
        factors = sorted(neck.rescales, reverse=True)  # what Feature2Pyramid does, whatever their order
    elif hasattr(neck, 'scales'):
        factors = list(neck.scales)
    else:
        raise ValueError(f'neck must tell its factors, by rescales or scales, got a {type(neck).__name__}.')
    if levels not in (1, len(factors)):  # of a single level MultiLevelNeck makes all
        raise ValueError(f'neck must have a factor for each of {levels} levels, got {factors}.')
    return factors


def _per_level(values) -> list:
    """A list of what a user gave per level; a single value is that of a single level."""
    return list(values) if isinstance(values, Sequence) else [values]
