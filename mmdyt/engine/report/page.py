"""The page about runs: one file, no server, no network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmdyt.engine.visualize.page import JPEG, fill, picture_uri
from mmdyt.files import write_text

from .reading import Points, Run

MARK = '<!-- a report of mmdyt -->'  # what is safe to be replaced
MOST_POINTS, BINS, SIDE = 400, 24, 320
HERE = Path(__file__).parent
STYLES = (HERE.parent / 'visualize' / 'page.css', HERE / 'report.css')


def write_report(runs: Sequence[Run], file: Path, pictures: int = 6) -> None:
    """Write a page about runs.

    Args:
        runs: At least one.
        file: To write, ``.html``.
        pictures: How many of each run at most.
    """
    data = dict(runs=[_packed(run, pictures) for run in runs], differences=differences(runs))
    page = fill(HERE / 'report.html', STYLES, [HERE / 'report.js'], data)
    write_text(file, f'{MARK}\n{page}')


def _packed(run: Run, pictures: int) -> dict:
    return dict(
        name=run.name,
        curves={key: thinned(points) for key, points in sorted(run.curves.items())},
        final=run.final,
        seconds=run.seconds,
        costs=histogram(run.costs),
        pictures=[found for found in map(_picture, run.pictures[: 2 * pictures]) if found][:pictures],
        broken=run.broken,
    )


def thinned(points: Points) -> Points:
    """At most so many points as a screen shows, each the mean of its neighbours."""
    if len(points) <= MOST_POINTS:
        return points
    parts = np.array_split(np.asarray(points, float), MOST_POINTS)
    return [(float(part[-1, 0]), float(part[:, 1].mean())) for part in parts]


def histogram(costs: Sequence[float]) -> dict | None:
    """How many images cost how much, and percentiles; None where nothing is known."""
    if not costs:
        return None
    low, high = min(costs), max(costs)
    counts = np.histogram(costs, BINS, (low, high) if high > low else (low - 0.5, low + 0.5))[0]
    marks = dict(zip(('min', 'p5', 'median', 'p95', 'max'), np.percentile(costs, [0, 5, 50, 95, 100]), strict=True))
    return dict(counts=counts.tolist(), marks={name: float(value) for name, value in marks.items()}, images=len(costs))


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str | None]]]:
    """Keys whose values are not the same in all runs whose config is known, and each run's value as text."""
    known = [run.config for run in runs if run.config]
    keys = dict.fromkeys(key for config in known for key in config)
    different = [key for key in keys if len({_text(config, key) for config in known}) > 1]
    return [(key, [_text(run.config, key) for run in runs]) for key in different]


def _text(config: dict[str, Any], key: str) -> str | None:
    return repr(config[key]) if key in config else None


def _picture(file: Path) -> tuple[str, str] | None:
    """Its name and all of it, small; None where it is none."""
    picture = cv2.imread(str(file))
    return None if picture is None else (file.name, picture_uri(picture, cv2.INTER_AREA, *JPEG, side=SIDE))
