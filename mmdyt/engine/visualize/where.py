"""Where in a picture tokens ran: by class, and by the distance to where two classes meet.

Counts are (2, K) arrays, sums of shares over the pixels that were seen and how many these are, for K classes or bins:
those of several images add up.
"""

from collections.abc import Callable, Iterable

import cv2
import numpy as np

from mmdyt.engine.visualize.sample import SampleDispatch

IGNORED = 255
ROUNDING = 1e-9  # of a cell: where a corner lies on the border of two, it is the next one's
EDGES = (0, 4, 8, 16, 32, 64, np.inf)  # pixels


def mean_map(masks: np.ndarray) -> np.ndarray:
    """Mean over the branches (L, ...) of what each has seen; NaN where none has seen anything."""
    seen = ~np.isnan(masks)
    number = seen.sum(0)
    return np.divide(np.where(seen, masks, 0).sum(0), number, out=np.full(number.shape, np.nan), where=number > 0)


def to_pixels(cells: np.ndarray, height: int, width: int, extent: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """Give each pixel the value of the cell (H', W') that its upper left corner lies in.

    Args:
        cells: Of a map.
        height: Pixels of the picture.
        width: Pixels.
        extent: Of the map, as that of a :class:`~mmdyt.engine.visualize.sample.SampleDispatch`.
    """
    sides = zip((height, width), cells.shape, extent, strict=True)
    rows, columns = (np.minimum(np.arange(n) * k / (n * e) + ROUNDING, k - 1).astype(int) for n, k, e in sides)
    return cells[rows][:, columns]


def by_class(share: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Count shares by class.

    Args:
        share: (H, W), NaN where nothing was seen.
        labels: (H, W), class indices; 255 is ignored.
        classes: Number of them.

    Shape:
        (2, classes).
    """
    return _count(share, labels, labels < classes, classes)


def by_boundary_distance(share: np.ndarray, labels: np.ndarray, edges: tuple[float, ...] = EDGES) -> np.ndarray:
    """Count shares by the distance to the next boundary; an image of one class lies in the last bin.

    Args:
        share: Of :func:`by_class`.
        labels: Of :func:`by_class`.
        edges: Of the bins, in pixels, rising from 0 to infinity; a bin includes its lower edge.

    Shape:
        (2, number of bins).
    """
    bins = np.searchsorted(edges[1:-1], boundary_distance(labels), side='right')
    return _count(share, bins, labels != IGNORED, len(edges) - 1)


def boundary_distance(labels: np.ndarray) -> np.ndarray:
    """Distance (H, W) in pixels to the next pixel that touches another class at a side; infinite where there is none.

    Pixels that are ignored have no class, and so no boundary.
    """
    boundary = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        one, other, of_one, of_other = (
            array.swapaxes(0, axis)[part] for array in (labels, boundary) for part in (np.s_[:-1], np.s_[1:])
        )
        meet = (one != other) & (one != IGNORED) & (other != IGNORED)
        of_one |= meet
        of_other |= meet
    if not boundary.any():
        return np.full(labels.shape, np.inf)
    return cv2.distanceTransform((~boundary).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def total(
    samples: Iterable[SampleDispatch], count: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray | None:
    """Add up the counts of all samples that have a true label for each pixel; None where no sample has.

    Args:
        samples: Of them the mean map over the branches is counted.
        count: Of a share (H, W) and labels (H, W).
    """
    counts = [
        count(to_pixels(mean_map(sample.masks)[0], *np.shape(sample.truth), sample.extent), sample.truth)
        for sample in samples
        if np.ndim(sample.truth) == 2
    ]
    return np.sum(counts, axis=0) if counts else None


def mean(counts: np.ndarray) -> np.ndarray:
    """Mean share of each class or bin, (K,); NaN where there was no pixel."""
    sums, numbers = counts
    return np.divide(sums, numbers, out=np.full(len(sums), np.nan), where=numbers > 0)


def _count(share: np.ndarray, groups: np.ndarray, valid: np.ndarray, number: int) -> np.ndarray:
    valid = valid & ~np.isnan(share)
    groups = groups[valid].astype(int)
    return np.stack([np.bincount(groups, weights, number) for weights in (share[valid], np.ones(groups.size))])
