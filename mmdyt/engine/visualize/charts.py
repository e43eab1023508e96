"""Charts of many samples: rates, costs, and where in a picture tokens ran. Each is a figure of matplotlib's."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from mmdyt.engine.visualize import where
from mmdyt.engine.visualize.sample import SampleDispatch
from mmdyt.files import whole_path


def layer_rates(samples: Sequence[SampleDispatch]):
    """Bars of the mean activation rate of each branch; whiskers from the 5th to the 95th percentile of the samples."""
    rates = np.stack([sample.rates() for sample in samples])
    mean, (p5, p95) = rates.mean(0), np.percentile(rates, [5, 95], axis=0)
    axes = _axes(width=2 + 0.4 * rates.shape[1])
    axes.bar(samples[0].layers, mean)
    middle = np.clip(mean, p5, p95)  # of few samples that are far apart, the mean may lie outside
    axes.errorbar(range(len(mean)), middle, [middle - p5, p95 - middle], fmt='none', ecolor='black', capsize=3)
    _as_share(axes)
    axes.tick_params('x', rotation=90)
    return axes.figure


def by_class(samples: Sequence[SampleDispatch]):
    """Bars of the mean activation of the pixels of each true class, most active first; None without true labels.

    Classes without a pixel are left out. Beside each name is its share of all pixels that were counted.
    """
    classes = max((len(sample.classes) for sample in samples), default=0)
    counts = where.total(samples, partial(where.by_class, classes=classes))
    if counts is None:
        return None
    names = next(sample.classes for sample in samples if len(sample.classes) == classes)
    order = [i for i in np.argsort(-where.mean(counts), kind='stable') if counts[1, i]]
    return _by_pixels([names[i] for i in order], counts[:, order])


def by_boundary_distance(samples: Sequence[SampleDispatch]):
    """Bars of the mean activation of pixels by their distance to a boundary; None without true labels."""
    counts = where.total(samples, where.by_boundary_distance)
    if counts is None:
        return None
    bins = zip(where.EDGES, where.EDGES[1:], strict=False)
    names = [f'{low}-{high}' if np.isfinite(high) else f'>{low}' for low, high in bins]
    figure = _by_pixels(names, counts)
    figure.axes[0].set_ylabel('pixels to a boundary')
    return figure


def costs(samples: Sequence[SampleDispatch]):
    """Histogram of the GMACs of the samples; lines mark their mean and the mean of the plain ViT.

    None where no sample has a cost, since their logits were no numbers.
    """
    gmacs = [sample.gmacs for sample in samples if np.isfinite(sample.gmacs)]
    if not gmacs:
        return None
    axes = _axes()
    axes.hist(gmacs, bins=min(30, max(5, len(gmacs) // 5)))
    for value, name, colour in (
        (np.mean([sample.gmacs_dense for sample in samples]), 'dense', 'black'),
        (np.mean(gmacs), 'mean', 'C1'),
    ):
        axes.axvline(value, color=colour, linestyle='--', label=f'{name}: {value:.4g}')
    axes.set_xlabel('GMACs per sample')
    axes.set_ylabel('samples')
    axes.legend()
    return axes.figure


def write_figure(figure, file: Path) -> None:
    """Write a figure; the ending of the file says which kind."""
    with whole_path(file) as part:
        figure.savefig(part, dpi=150)


def _by_pixels(names: Sequence[str], counts: np.ndarray):
    """Lying bars of mean shares, a line at the mean of all pixels, and how many pixels each bar stands for."""
    axes = _axes(height=2 + 0.25 * len(names))
    axes.barh(range(len(names)), where.mean(counts))
    pixels = counts[1] / max(counts[1].sum(), 1)
    axes.set_yticks(range(len(names)), [f'{name} ({part:.1%})' for name, part in zip(names, pixels, strict=True)])
    axes.invert_yaxis()
    if counts[1].any():
        mean = counts[0].sum() / counts[1].sum()
        axes.axvline(mean, color='black', linestyle='--', label=f'all pixels: {mean:.3f}')
        axes.legend()
    axes.set_xlim(0, 1)
    axes.set_xlabel('mean activation; in brackets: share of the pixels')
    axes.grid(alpha=0.3, axis='x')
    return axes.figure


def _as_share(axes) -> None:
    axes.set_ylim(0, 1)
    axes.set_ylabel('activation rate')
    axes.grid(alpha=0.3, axis='y')


def _axes(width: float = 6, height: float = 4):
    """The axes of a new figure, which no state of matplotlib's knows."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout='constrained').subplots()
