"""One HTML page that shows which tokens of which image ran: no server, no network, nothing beside the file."""

import base64
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np

from mmdyt.engine.pictures import heat_map
from mmdyt.engine.visualize.overlays import answers, painted, palette
from mmdyt.engine.visualize.sample import SampleDispatch
from mmdyt.files import write_text

HERE = Path(__file__).parent
SIDE = 640  # pixels, the longer side of a picture at most
JPEG = ('jpeg', [cv2.IMWRITE_JPEG_QUALITY, 85])
PNG = ('png', [])  # of labels, whose colours must stay


def write_page(samples: Iterable[SampleDispatch], file: str | Path, title: str) -> None:
    """Write a page with pictures, maps and numbers of all samples in it.

    A sample takes some 60 kB a picture and 4 bytes a cell, branch and frame. Samples are packed one after the other,
    so they may come from a generator.

    Args:
        samples: Of any task, also of several.
        file: To write, ``.html``.
        title: Of the page.
    """
    viridis = heat_map(np.arange(256)[None] / 255)[..., ::-1]
    data = dict(title=title, colours=_base64(viridis), images=[packed(sample) for sample in samples])
    write_text(file, fill(HERE / 'page.html', [HERE / 'page.css'], [HERE / 'decide.js', HERE / 'page.js'], data))


def packed(sample: SampleDispatch) -> dict:
    """What the page's script reads of a sample; all as in the sample, but JSON."""
    return dict(
        name=sample.name,
        gmacs=json_number(sample.gmacs),
        dense=json_number(sample.gmacs_dense),
        rest=json_number(sample.gmacs_rest),
        rates=[json_number(rate) for rate in sample.rates()],
        layers=list(sample.layers),
        cells=list(sample.masks.shape[2:]),
        extent=list(sample.extent),
        masks=_base64(quantise(sample.masks, 0, 1, np.uint8)),
        logits=None if sample.logits is None else _logits(sample.logits),
        costs=[[[json_number(x), json_number(y)] for x, y in cost.points] for cost in sample.costs],
        frames=[picture_uri(picture, cv2.INTER_AREA, *JPEG) for picture in sample.pictures],
        labels={name: picture_uri(labels, cv2.INTER_NEAREST, *PNG) for name, labels in painted(sample).items()},
        classes=_classes(sample),
        answers=answers(sample),
    )


def quantise(values: np.ndarray, low: np.ndarray | float, high: np.ndarray | float, dtype: type) -> np.ndarray:
    """Round values between ``low`` and ``high`` to the codes of an unsigned type; its highest code stands for NaN."""
    unseen = np.iinfo(dtype).max
    width = np.where(np.equal(low, high), 1.0, np.subtract(high, low))
    codes = ((np.clip(values, low, high) - low) / width * (unseen - 1)).round()
    return np.where(np.isnan(codes), unseen, codes).astype(dtype)


def _logits(logits: np.ndarray) -> dict:
    """Codes of 16 bits, little end first, between the lowest and the highest finite logit of each branch."""
    rows = np.asarray(logits, float).reshape(len(logits), -1)
    finite = np.isfinite(rows)
    lows = np.nan_to_num(rows.min(1, where=finite, initial=np.inf), posinf=0)
    highs = np.nan_to_num(rows.max(1, where=finite, initial=-np.inf), neginf=0)
    codes = quantise(rows, lows[:, None], highs[:, None], np.uint16)
    return dict(codes=_base64(codes.astype('<u2')), lows=lows.tolist(), highs=highs.tolist())


def _classes(sample: SampleDispatch) -> list[tuple[str, str]]:
    """Name and colour of each class that a segmentation has or was taken for."""
    maps = [labels for labels in (sample.truth, sample.prediction) if np.ndim(labels) == 2]
    present = np.unique(np.concatenate([np.unique(labels) for labels in maps])) if maps else []
    colours = palette(sample)
    return [
        (sample.classes[i], 'rgb({}, {}, {})'.format(*colours[i]))
        for i in present
        if i < min(len(sample.classes), len(colours))
    ]


def picture_uri(picture: np.ndarray, interpolation: int, kind: str, options: Sequence[int], side: int = SIDE) -> str:
    """A picture (H, W, 3), scaled down to a longer side, as an address that holds all of it."""
    scale = min(side / max(picture.shape[:2]), 1)
    width, height = (max(round(length * scale), 1) for length in picture.shape[1::-1])
    small = cv2.resize(picture, (width, height), interpolation=interpolation)
    encoded = cv2.imencode(f'.{kind}', small, options)[1]
    return f'data:image/{kind};base64,{_base64(encoded)}'


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def json_number(value: float) -> float | None:
    """A number as JSON knows it; it knows no NaN."""
    return float(value) if np.isfinite(value) else None


def fill(page: Path, styles: Sequence[Path], scripts: Sequence[Path], data: dict) -> str:
    """A page with its styles, scripts and data in it, at the places that it has for them."""
    style, script = (''.join(file.read_text('utf-8') for file in files) for files in (styles, scripts))
    text = json.dumps(data, allow_nan=False, separators=(',', ':')).replace('<', '\\u003c')  # ends no script
    filled = page.read_text('utf-8')
    for place, part in (('/*STYLE*/', style), ('/*SCRIPT*/', script), ('/*DATA*/', text)):
        filled = filled.replace(place, part)
    return filled
