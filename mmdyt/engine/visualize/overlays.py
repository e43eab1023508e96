"""Pictures of one image or clip with what ran over it. Pictures are (H, W, 3), 8 bits, blue first."""

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np

from mmdyt.engine.pictures import beside, caption, framed, heat_map, legend, paint_labels, stack
from mmdyt.engine.visualize.sample import SampleDispatch
from mmdyt.engine.visualize.where import mean_map, to_pixels

CELL = 240  # pixels across, of a picture in a sheet
COLUMNS = 4


def overlay(
    picture: np.ndarray, share: np.ndarray, opacity: float = 0.55, extent: tuple[float, float] = (1.0, 1.0)
) -> np.ndarray:
    """Paint shares (H', W') over a picture in grey, so that all colour is theirs; it stays grey where they are NaN.

    ``extent`` is that of the sample.
    """
    grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    share = to_pixels(share, *picture.shape[:2], extent)
    painted = cv2.addWeighted(grey, 1 - opacity, heat_map(np.nan_to_num(share)), opacity, 0)
    return np.where(np.isnan(share)[..., None], grey, painted)


def value_legend(width: int) -> np.ndarray:
    """A strip (24, width, 3) that says which colour is which share of the branches that ran."""
    return legend(['0 skipped', '0.25', '0.5', '0.75', '1 ran'], heat_map(np.linspace(0, 1, 5)[None])[0], width)


def fit(picture: np.ndarray, width: int = CELL) -> np.ndarray:
    """Scale a picture to a width and keep its shape."""
    height = max(round(picture.shape[0] * width / picture.shape[1]), 1)
    kind = cv2.INTER_AREA if width < picture.shape[1] else cv2.INTER_NEAREST
    return cv2.resize(picture, (width, height), interpolation=kind)


def contact(pictures: Sequence[np.ndarray], captions: Sequence[str], columns: int = COLUMNS) -> np.ndarray:
    """Lay out pictures of one size, each under its caption, in rows of at most ``columns``."""
    cells = [
        np.vstack([caption(text, picture.shape[1]), picture]) for picture, text in zip(pictures, captions, strict=True)
    ]
    columns = min(columns, len(cells))
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    return stack([beside(cells[i : i + columns]) for i in range(0, len(cells), columns)])


def layer_sheet(sample: SampleDispatch, frame: int = 0) -> np.ndarray:
    """What each branch ran in a frame; captions say its rate there."""
    picture = fit(sample.pictures[frame])
    maps = sample.masks[:, frame]
    captions = [f'{name}: {_rate(map)}' for name, map in zip(sample.layers, maps, strict=True)]
    return contact([overlay(picture, map, extent=sample.extent) for map in maps], captions)


def strip(sample: SampleDispatch) -> np.ndarray:
    """Mean over the branches, over each frame; captions say the frame and its rate."""
    maps = mean_map(sample.masks)
    pairs = zip(sample.pictures, maps, strict=True)
    pictures = [overlay(fit(picture), map, extent=sample.extent) for picture, map in pairs]
    return contact(pictures, [f'frame {i}: {_rate(map)}' for i, map in enumerate(maps)])


def painted(sample: SampleDispatch) -> dict[str, np.ndarray]:
    """Truth and prediction of a segmentation as pictures, as far as there are any."""
    both = dict(truth=sample.truth, prediction=sample.prediction)
    return {name: paint_labels(labels, palette(sample)) for name, labels in both.items() if np.ndim(labels) == 2}


def answers(sample: SampleDispatch) -> dict[str, str]:
    """Truth and prediction of a classification in words, as far as there are any."""
    both = dict(truth=sample.truth, prediction=sample.prediction)
    words = {
        name: sample.classes[index] if len(sample.classes) else f'class {index}'
        for name, index in both.items()
        if index is not None and np.ndim(index) == 0
    }
    if 'prediction' in words and sample.scores is not None:
        words['prediction'] += f' ({sample.scores[sample.prediction]:.2f})'
    return words


def palette(sample: SampleDispatch) -> Sequence[Sequence[int]]:
    """Colours of the classes, red first; where the sample has none, such as are far apart from one to the next."""
    return sample.palette if len(sample.palette) else distinct_colours(max(len(sample.classes), 1))


def distinct_colours(number: int) -> list[tuple[int, int, int]]:
    """Colours, red first, such that one is far from the next."""
    turns = [(i * 0.618) % 1 for i in range(number)]
    return [tuple(round(255 * part) for part in colorsys.hsv_to_rgb(turn, 0.65, 0.9)) for turn in turns]


def sheet(sample: SampleDispatch, frames: Sequence[int] | None = None) -> np.ndarray:
    """The standard picture of one sample.

    From above: its numbers; the picture, what it is and was taken for, and the mean over the branches; each branch.

    Args:
        sample: Of any task.
        frames: Of a clip, those of which each branch is shown; else the one in the middle.
    """
    rows = [strip(sample) if len(sample.pictures) > 1 else _overview(sample)]
    for frame in [len(sample.pictures) // 2] if frames is None else frames:
        rows.append(layer_sheet(sample, frame))
        if len(sample.pictures) > 1:
            rows.insert(-1, caption(f'frame {frame}, by layer', CELL))
    width = max(2 * CELL, *(row.shape[1] for row in rows))
    headline = np.vstack([caption(text, width) for text in _headline(sample)])
    return framed(stack([_widened(row, width) for row in (headline, *rows, value_legend(2 * CELL))]))


def _overview(sample: SampleDispatch) -> np.ndarray:
    """The picture, its labels and the mean map beside each other."""
    picture, mean = fit(sample.pictures[0]), mean_map(sample.masks)[0]
    size = picture.shape[1::-1]
    labels = {k: cv2.resize(v, size, interpolation=cv2.INTER_NEAREST) for k, v in painted(sample).items()}
    painted_mean = overlay(picture, mean, extent=sample.extent)
    cells = {'image': picture, **labels, f'mean of the layers: {sample.rate:.2f}': painted_mean}
    return contact(list(cells.values()), list(cells))


def _headline(sample: SampleDispatch) -> list[str]:
    """Lines above a sheet."""
    share = sample.gmacs / sample.gmacs_dense
    numbers = f'{sample.gmacs:.4g} of {sample.gmacs_dense:.4g} GMACs ({share:.0%}), activation rate {sample.rate:.3f}'
    words = [f'{name}: {word}' for name, word in answers(sample).items()]
    return [sample.name, numbers, *([', '.join(words)] if words else [])]


def _rate(share: np.ndarray) -> str:
    return 'not seen' if np.isnan(share).all() else f'{np.nanmean(share):.2f}'


def _widened(picture: np.ndarray, width: int) -> np.ndarray:
    """Add white at the right."""
    missing = width - picture.shape[1]
    return cv2.copyMakeBorder(picture, 0, 0, 0, missing, cv2.BORDER_CONSTANT, value=(255, 255, 255))
