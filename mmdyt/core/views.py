"""What of which sample the passes of a backbone see: windows, flips and scales of images, views of clips."""

from typing import NamedTuple

import torch.nn as nn
from torch import Tensor

from .grid import View, windows
from .padding import Views


class Seen(NamedTuple):
    """What one row of a pass shows.

    Attributes:
        sample: Place of the sample in the batch of the host.
        view: What of the image; of a clip, the frame as it was cut out.
        number: Which view of a clip; 0 for images.
    """

    sample: int
    view: View
    number: int = 0


class ViewTracker:
    """Tells of each pass of a host's backbone what its rows show.

    A host is told of by its calls (in mode ``'predict'``), and by the order in which it runs windows and views.

    Args:
        host: The model that owns the backbone.
    """

    def __init__(self, host: nn.Module):
        self._host = host
        conv = host.backbone.patch_embed.projection
        self._patch = tuple(conv.stride)
        self._contents: list[tuple[tuple[int, int], tuple[int, int]]] = []  # size and begin of each image
        self._flips: list[str] = []
        self._whole = (0, 0)
        self._places: list[tuple[int, int, int, int]] = []
        self._views = self._done = 0

    def begin(self, inputs: Tensor, samples: list | None) -> None:
        """A call of the host with a batch that is preprocessed.

        Args:
            inputs: (B, 3, H, W), or views of clips (B, V, 3, T, H, W).
            samples: Data samples, whose meta tells what is padding, and flips; None where there are none.
        """
        self._done = 0
        height, width = self._whole = tuple(inputs.shape[-2:])
        metas = [sample.metainfo for sample in samples] if samples else [{}] * len(inputs)
        if _is_recognizer(self._host):
            by_frame = inputs.dim() == 5 and inputs.shape[2] == 3  # of a 2D recognizer, whose frames are its views
            self._views = inputs.shape[1] if inputs.dim() == 6 or by_frame else 1
            self._contents, self._flips = len(metas) * [((height, width), (0, 0))], len(metas) * ['none']
            return
        pads = getattr(self._host.data_preprocessor, 'pad_size_divisor', 1) > 1  # mmpretrain's, which tells nobody
        self._contents = [_content(meta, height, width, pads) for meta in metas]
        self._flips = [(meta.get('flip_direction') or 'horizontal') if meta.get('flip') else 'none' for meta in metas]
        test_cfg = getattr(self._host, 'test_cfg', None) or {}
        self._places = [(0, 0, height, width)]
        if test_cfg.get('mode') == 'slide' and {'crop_size', 'stride'} <= set(test_cfg):  # else the host will complain
            self._places = windows((height, width), test_cfg['crop_size'], test_cfg['stride'])

    @property
    def padded(self) -> bool:
        """Whether an image of the call is smaller than the batch."""
        return any(size != self._whole for size, _ in self._contents)

    def rows(self, number: int, whole: bool = False) -> list[Seen]:
        """What the rows of the next pass show.

        Args:
            number: Of rows.
            whole: Whether they are whole images, whatever a test would do.

        Raises:
            RuntimeError: If the host was not called, or ran more than was foreseen.
        """
        samples = len(self._contents)
        if _is_recognizer(self._host):
            first, self._done = self._done, self._done + number
            self._check(self._done <= samples * self._views)
            rows = (divmod(row, self._views) for row in range(first, self._done))
            return [Seen(i, self._view(i, 0, 0), view) for i, view in rows]
        self._check(samples and number % samples == 0)
        if whole:
            return [Seen(i, self._view(i, 0, 0)) for i in range(samples)]
        first, self._done = self._done, self._done + number // samples
        self._check(self._done <= len(self._places))
        return [
            Seen(i, self._view(i, top, left))
            for i in range(samples)
            for top, left, _, _ in self._places[first : self._done]
        ]

    def _view(self, sample: int, top: int, left: int) -> View:
        """A window of the batch as one of the image."""
        size, (above, before) = self._contents[sample]
        return View(size, self._patch, top - above, left - before, self._flips[sample])

    def _check(self, foreseen) -> None:
        if not foreseen:
            raise RuntimeError(
                'model must run its backbone as mmpretrain, mmseg or mmaction2 do, once for each window or view of a '
                'call, got another order: it cannot be told where tokens lie in the image.'
            )


def views_of(host: nn.Module, inputs: Tensor, samples: list | None, mode: str) -> Views | None:
    """What the passes of a call of a host show, where some of it is padding; None where there is none.

    Args:
        host: The model that owns the backbone.
        inputs: As of :meth:`ViewTracker.begin`.
        samples: Likewise.
        mode: Of the call: windows are those of ``'predict'``; in others each pass shows the whole batch.
    """
    if not samples or not isinstance(inputs, Tensor) or inputs.dim() != 4 or _is_recognizer(host):
        return None
    tracker = ViewTracker(host)
    tracker.begin(inputs, samples)
    if not tracker.padded:
        return None

    def views(rows: int) -> list[View] | None:
        if mode != 'predict':
            tracker.begin(inputs, samples)
            return [seen.view for seen in tracker.rows(rows, whole=True)] if rows == len(inputs) else None
        try:
            return [seen.view for seen in tracker.rows(rows)]
        except RuntimeError:  # a host of another order: then nothing is known
            return None

    return views


def _is_recognizer(host: nn.Module) -> bool:
    """Whether it is mmaction2's, whose clips have no padding."""
    return getattr(host, 'cls_head', None) is not None


def _content(meta: dict, height: int, width: int, pads: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of an image without padding, and where in the batch it begins."""
    if pads and meta.get('img_shape'):
        return tuple(min(pair) for pair in zip(meta['img_shape'][:2], (height, width), strict=True)), (0, 0)
    left, right, top, bottom = meta.get('img_padding_size') or meta.get('padding_size') or (0, 0, 0, 0)
    return (height - top - bottom, width - left - right), (top, left)
