"""All pictures of some samples, in one folder."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmdyt.engine.pictures import write_picture
from mmdyt.engine.visualize import charts
from mmdyt.engine.visualize.overlays import sheet
from mmdyt.engine.visualize.page import write_page
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


def file_stem(name: str) -> str:
    """A name of a file from that of a sample, whatever is in it."""
    return re.sub(r'[^\w.-]+', '_', Path(name).stem)[:80]


def rgb_sheet(sample: SampleDispatch) -> np.ndarray:
    """The picture of a sample, red first, as mmengine's visualisation back ends want it."""
    return np.ascontiguousarray(sheet(sample)[..., ::-1])
