"""Between the frames of a clip and mmaction2's heads. V clips, T frames, N tokens a frame, C width."""

from collections.abc import Mapping

from mmengine.model import BaseModule
from torch import Tensor

from mmdyt.core.aggregator import CrossAttentionAggregator
from mmdyt.core.options import check_choice, is_integer
from mmdyt.models.necks import ADAPTER, AdaptedLevel
from mmdyt.registry import MODELS

MODELS.register_module(module=CrossAttentionAggregator)
ROUTINGS = ('clip', 'frame')


@MODELS.register_module()
class ClipNeck(BaseModule):
    """Adapts the features of a clip's frames and aggregates them, each if asked to; a neck as mmaction2 wants it.

    With an aggregator the head gets one feature a clip, as ``TimeSformerHead`` reads it; without one the features of
    the frames, as ``I3DHead`` and other heads of 3D recognizers read them.

    Args:
        in_channels: C.
        adapter: Config of an adapter of all tokens, e.g. ``dict(type='mmdyt.MoEAdapter', num_experts=4)``; ``dim`` is
            filled in. None adapts nothing. Fresh adapters change nothing.
        routing: What one mixture of a ``MoEAdapter`` is chosen for, ``'clip'`` or ``'frame'``; another adapter treats
            each token alike.  # paper silent
        aggregator: Config of what makes one feature of all tokens, e.g.
            ``dict(type='mmdyt.CrossAttentionAggregator', num_heads=12)``; ``dim`` is filled in. None leaves them all.
        init_cfg: As in any mmengine module.

    Shape:
        Tokens (V, T, N, C) -> (V, C), without an aggregator (V, T, N, C). Maps (V, C, T, H, W) stay what they are, and
        cannot be aggregated.

    Raises:
        ValueError: If an argument is out of range, or features are not what ``in_channels`` promised.
    """

    def __init__(
        self,
        in_channels: int,
        adapter: Mapping | None = None,
        routing: str = 'clip',
        aggregator: Mapping | None = None,
        init_cfg: Mapping | list[Mapping] | None = None,
    ):
        super().__init__(init_cfg)
        if not (is_integer(in_channels) and in_channels >= 1):
            raise ValueError(f'in_channels must be a positive integer, got {in_channels!r}.')
        check_choice(ROUTINGS, routing=routing)
        for name, part in dict(adapter=adapter, aggregator=aggregator).items():
            if not (part is None or isinstance(part, Mapping)):
                raise ValueError(f'{name} must be a config or None, got {part!r}.')
        if adapter and adapter.get('frames_per_clip', 1) != 1:
            raise ValueError(
                f'frames_per_clip must be 1 in the adapter of a ClipNeck, whose routing decides, got '
                f'{adapter["frames_per_clip"]}.'
            )
        adapter = adapter and {key: value for key, value in adapter.items() if key != 'frames_per_clip'}
        width = dict(dim=in_channels)
        self.in_channels = in_channels
        self.routing = routing
        self.adapter = adapter and AdaptedLevel(MODELS.build(ADAPTER | adapter | width))
        self.aggregator = aggregator and MODELS.build(dict(type='mmdyt.CrossAttentionAggregator') | aggregator | width)

    def forward(self, x: Tensor, data_samples: list | None = None) -> tuple[Tensor, dict]:
        """Features for the head, and no losses of its own; ``data_samples`` are mmaction2's and not read."""
        self._check(x)
        if self.adapter is not None:
            x = self._adapt(x)
        if self.aggregator is not None:
            x = self.aggregator(x)
        return x, {}

    def _adapt(self, x: Tensor) -> Tensor:
        """Features plus their update: all tokens of a clip, or of a frame, are one sample of the adapter."""
        if self.routing == 'clip':
            first = 1 if x.dim() == 4 else 2
            return self.adapter(x.flatten(first, first + 1)).unflatten(first, x.shape[first : first + 2])
        frames = x if x.dim() == 4 else x.transpose(1, 2)
        adapted = self.adapter(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return adapted if x.dim() == 4 else adapted.transpose(1, 2)

    def _check(self, x: Tensor) -> None:
        """Refuse what the arguments did not promise."""
        if not (isinstance(x, Tensor) and x.dim() in (4, 5)):
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f'features must be (V, T, N, C) or (V, C, T, H, W), got {shape}.')
        if self.aggregator is not None and x.dim() != 4:
            raise ValueError(
                f"features must be tokens (V, T, N, C) for an aggregator, got {tuple(x.shape)}. Set the backbone's "
                "out_type='raw'."
            )
        channels = x.shape[3 if x.dim() == 4 else 1]
        if channels != self.in_channels:
            raise ValueError(f'features must have {self.in_channels} channels, as in_channels says, got {channels}.')
