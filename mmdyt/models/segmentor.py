"""Dynamic Tuning in mmsegmentation."""

from collections.abc import Callable

import torch
from mmseg.models import EncoderDecoder
from torch import Tensor, nn

from mmdyt.core.grid import windows
from mmdyt.core.levels import level_masks, resize_masks
from mmdyt.core.observe import DispatchRecord, dynamic_branches
from mmdyt.core.options import check_switches, is_integer
from mmdyt.core.window_memory import WindowMemory
from mmdyt.models.dynamic_model import DynamicModel
from mmdyt.models.necks import level_factors
from mmdyt.registry import MODELS


@MODELS.register_module()
class DyTEncoderDecoder(DynamicModel, EncoderDecoder):
    """mmseg's ``EncoderDecoder`` trained with Dynamic Tuning (DyT): its losses plus the rate loss.

    ``complete_weight`` and ``distill_weight`` add the losses of the complete model, per pixel; the paper has them for
    images and video only.  # differs from paper: opt-in, off by default.

    Stock heads, necks, whole and slide inference and test-time augmentation work unchanged. The paper's segmentation
    recipe is cross-entropy, 0.4 x auxiliary cross-entropy (both from the heads' configs) and 2.0 x rate loss.

    Args:
        target_rate: See :class:`~mmdyt.models.dynamic_model.DynamicModel`.
        rate_weight: See there.
        complete_weight: See there.
        distill_weight: See there. For decode heads that classify pixels with ``conv_seg``, as nearly all of mmseg do.
        **host: Arguments of mmseg's ``EncoderDecoder``. ``test_cfg=dict(mode='slide', windows_per_pass=4, ...)`` runs
            several windows of a sliding test at once, which mmseg runs one by one, with equal results;
            ``reuse_decisions=True`` there lets overlapping windows agree: each takes over what those before it decided
            about the cells that they share (:class:`mmdyt.core.window_memory.WindowMemory`), one window at a time.

    Raises:
        ValueError: If an argument is out of range, or the decode head has no logits to distil.
    """

    def __init__(self, **host):
        super().__init__(**host)
        if self.distill_weight and not hasattr(self.decode_head, 'conv_seg'):
            raise ValueError(
                f'distill_weight must be 0 with a decode head without conv_seg, got {self.distill_weight} with '
                f'{type(self.decode_head).__name__}.'
            )
        at_once = self._windows_per_pass()
        if not (is_integer(at_once) and at_once >= 1):
            raise ValueError(f'test_cfg.windows_per_pass must be at least 1, got {at_once!r}.')
        check_switches(**{'test_cfg.reuse_decisions': self._reuses()})
        if self._reuses() and at_once > 1:
            raise ValueError(
                f'test_cfg.windows_per_pass must be 1 with reuse_decisions, since windows follow each other, got '
                f'{at_once}.'
            )
        self.check_classes()

    def _windows_per_pass(self) -> int:
        return (self.test_cfg or {}).get('windows_per_pass', 1)

    def _reuses(self) -> bool:
        return (self.test_cfg or {}).get('reuse_decisions', False)

    def slide_inference(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
        """Scores of whole images (B, K, H, W), the mean over the windows that show a pixel."""
        at_once = self._windows_per_pass()
        if self._reuses() and dynamic_branches(self):
            patch = tuple(self.backbone.patch_embed.projection.stride)
            with WindowMemory(self.backbone, tuple(inputs.shape[2:]), patch).open() as memory:
                return self._slide(inputs, batch_img_metas, 1, memory.move)
        if at_once == 1:
            return super().slide_inference(inputs, batch_img_metas)
        return self._slide(inputs, batch_img_metas, at_once)

    def _slide(
        self, inputs: Tensor, batch_img_metas: list[dict], at_once: int, move: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """Some windows at once; ``move`` is told where the first of them begins."""
        places = windows(inputs.shape[2:], self.test_cfg.crop_size, self.test_cfg.stride)
        scores, seen = 0.0, inputs.new_zeros(1, 1, *inputs.shape[2:])
        for first in range(0, len(places), at_once):
            some = [(..., slice(y, y + h), slice(x, x + w)) for y, x, h, w in places[first : first + at_once]]
            if move:
                move(*places[first][:2])
            crops = torch.stack([inputs[place] for place in some], dim=1).flatten(0, 1)  # those of an image together
            metas = [dict(meta, img_shape=crops.shape[2:]) for meta in batch_img_metas for _ in some]
            found = self.encode_decode(crops, metas).unflatten(0, (len(inputs), -1))
            if first == 0:
                scores = inputs.new_zeros(len(inputs), found.shape[2], *inputs.shape[2:])
            for i, place in enumerate(some):
                scores[place] += found[:, i]
                seen[place] += 1
        return scores / seen

    def level_masks(
        self, record: DispatchRecord, inputs: Tensor, index: int = -1, padded: float = 0.0
    ) -> tuple[Tensor, ...]:
        """Which share of the decisions below each level that the heads read was for a token to run, cell by cell.

        For heads and losses that treat skipped cells otherwise; stock heads need not know. See
        :func:`mmdyt.core.levels.level_masks`, whose masks are resized here as the neck resizes the features.

        Args:
            record: Of a pass: ``with record_dispatch(model) as record: features = model.extract_feat(inputs)``.
            inputs: What that pass was given, images or windows (B, 3, H, W); their shape and device are read only.
            index: Of the pass within the record, from 0; -1 is the last one.
            padded: Value of cells that lie wholly in padding, in [0, 1].

        Returns:
            (B, 1, h, w) for each level, h x w as the features behind the neck have it.

        Raises:
            ValueError: If ``inputs`` are not those of the pass, or the neck does not tell how it resizes.
        """
        grid = inputs.new_empty(inputs.shape[0], 1, *self.backbone.grid(*inputs.shape[-2:]))
        masks = level_masks(record.of_pass(index), self.backbone.out_indices, grid, padded)
        factors = level_factors(self.neck if self.with_neck else None, len(masks))
        masks = masks * len(factors) if len(masks) == 1 else masks
        return tuple(resize_masks(mask, factor) for mask, factor in zip(masks, factors, strict=True))

    def logits_module(self) -> nn.Module:
        """The layer that classifies the decode head's pixels."""
        return self.decode_head.conv_seg
