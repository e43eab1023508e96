"""All pictures of some samples, in one folder."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from mmdyt.engine.pictures import write_picture
from mmdyt.engine.visualize import charts, where
from mmdyt.engine.visualize.overlays import sheet
from mmdyt.engine.visualize.page import json_number, write_page
from mmdyt.engine.visualize.sample import SampleDispatch

CHARTS = dict(
    rates=charts.layer_rates, costs=charts.costs, classes=charts.by_class, boundaries=charts.by_boundary_distance
)


def draw(samples: Sequence[SampleDispatch], folder: Path, title: str) -> Path:
    """Draw a picture of each sample, charts over all, and one page that needs no network.

    Args:
        samples: At least one.
        folder: Made where it is missing; what is in it stays, but for files of the same names.
        title: Of the page.

    Returns:
        The page, ``index.html``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for i, sample in enumerate(samples):
        write_picture(folder / f'{i:04d}_{file_stem(sample.name)}.png', sheet(sample))
    for name, chart in CHARTS.items():
        figure = chart(samples)
        if figure is not None:
            charts.write_figure(figure, folder / f'{name}.png')
    page = folder / 'index.html'
    write_page(samples, page, title)
    return page


def numbers(samples: Sequence[SampleDispatch]) -> dict:
    """What the pictures show, as plain values.

    Returns:
        ``samples``, one after the other, and for segmentation with true labels ``by_class`` and
        ``by_boundary_distance``: the mean over the branches of the activation of pixels, and how many these are.
    """
    found = dict(samples=[_of_sample(sample) for sample in samples])
    classes = max((sample.classes for sample in samples), key=len, default=())
    groups = dict(by_class=(partial(where.by_class, classes=len(classes)), classes))
    groups['by_boundary_distance'] = where.by_boundary_distance, [f'from {edge}' for edge in where.EDGES[:-1]]
    for name, (count, labels) in groups.items():
        counts = where.total(samples, count)
        if counts is not None:
            rows = zip(labels, where.mean(counts).tolist(), counts[1].tolist(), strict=True)
            found[name] = {label: dict(active=mean, pixels=int(number)) for label, mean, number in rows if number}
    return found


def _of_sample(sample: SampleDispatch) -> dict:
    rates = {layer: json_number(rate) for layer, rate in zip(sample.layers, sample.rates(), strict=True)}
    costs = dict(gmacs=json_number(sample.gmacs), gmacs_dense=sample.gmacs_dense)
    return dict(file=sample.name, **costs, activation_rate=json_number(sample.rate), rates=rates)


def file_stem(name: str) -> str:
    """A name of a file from that of a sample, whatever is in it."""
    return re.sub(r'[^\w.-]+', '_', Path(name).stem)[:80]


def rgb_sheet(sample: SampleDispatch) -> np.ndarray:
    """The picture of a sample, red first, as mmengine's visualisation back ends want it."""
    return np.ascontiguousarray(sheet(sample)[..., ::-1])
