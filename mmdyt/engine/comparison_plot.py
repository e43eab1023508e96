"""What methods reach, drawn against what they cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmdyt.files import whole_path

PANELS = dict(gmacs='GMACs per sample', tuned='tuned parameters of the backbone (M)')
MARGIN = 3  # pixels around a point that labels leave free
PLACES = [  # where a label may stand, the first that is free: points to the right and up, and how it is aligned
    (x * far, y * far, dict(ha=ha, va=va))
    for far in (6, 14, 24, 36)
    for x, y, ha, va in (
        (1, 0, 'left', 'center'),
        (-1, 0, 'right', 'center'),
        (0, 1, 'center', 'bottom'),
        (0, -1, 'center', 'top'),
        (0.7, 0.7, 'left', 'bottom'),
        (-0.7, 0.7, 'right', 'bottom'),
        (0.7, -0.7, 'left', 'top'),
        (-0.7, -0.7, 'right', 'top'),
    )
]


def plot(table: Sequence[Mapping], metric: str | None, file: Path) -> None:
    """Draw the metric against GMACs and against tuned parameters, bars from the worst to the best seed.

    Args:
        table: Of :func:`mmdyt.engine.comparison.rows`; methods without a result are left out.
        metric: Its name.
        file: A picture; its ending says which kind.
    """
    figure, panels = _figure(len(PANELS))
    for axes, (key, title) in zip(panels, PANELS.items(), strict=True):
        shown = [row for row in table if row['mean'] is not None and row[key] is not None]
        if key == 'tuned':
            least = min((row[key] for row in shown if row[key]), default=1.0)
            axes.set_xscale('symlog', linthresh=least / 2)  # logarithmic, and has a place for nothing
        for i, row in enumerate(shown):
            bars = [[row['mean'] - row['low']], [row['high'] - row['mean']]]
            axes.errorbar(row[key], row['mean'], yerr=bars, fmt='o', color=f'C{i}', capsize=3)
        axes.set_xlabel(title)
    points = [
        {row['method']: (row[key], row['mean']) for row in table if None not in (row[key], row['mean'])}
        for key in PANELS
    ]
    _finish(figure, panels, points, metric, file)


def plot_latency(panels: Mapping[str, Sequence[Mapping]], metric: str | None, file: Path) -> None:
    """Draw the metric against latency, bars from the worst to the best seed, and from the 5th to the 95th percentile.

    Args:
        panels: Of :func:`mmdyt.engine.benchmark.accuracy.points`, by the title of the horizontal axis.
        metric: Its name.
        file: A picture; its ending says which kind.
    """
    figure, drawn = _figure(len(panels))
    for axes, (title, found) in zip(drawn, panels.items(), strict=True):
        for i, one in enumerate(found):
            seeds = [[one['mean'] - one['low']], [one['high'] - one['mean']]]
            rounds = [[one['median'] - one['p5']], [one['p95'] - one['median']]]
            axes.errorbar(one['median'], one['mean'], seeds, rounds, fmt='o', color=f'C{i}', capsize=3)
        axes.set_xlabel(title)
    points = [{one['name']: (one['median'], one['mean']) for one in found} for found in panels.values()]
    beside = [place for place in PLACES if place[0] and place[1]]  # bars go left, right, up and down
    _finish(figure, drawn, points, metric, file, beside)


def _figure(number: int):
    """A figure of some panels beside each other, and these."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * number, 5), layout='constrained')
    FigureCanvasAgg(figure)
    (panels,) = figure.subplots(1, number, sharey=True, squeeze=False)
    return figure, panels


def _finish(
    figure, panels: Sequence, points: Sequence[Mapping], metric: str | None, file: Path, places: Sequence = PLACES
) -> None:
    """Name the metric and the points of each panel, and write the picture."""
    for axes in panels:
        axes.margins(0.15)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f'{metric or "metric"} (%)')
    figure.draw_without_rendering()
    for axes, named in zip(panels, points, strict=True):
        _label(axes, named, places)
    with whole_path(file) as part:
        figure.savefig(part, dpi=150)


def _label(axes, points: Mapping[str, tuple[float, float]], places: Sequence) -> None:
    """Write a name beside each point, where it covers no point and no other name if there is such a place."""
    from matplotlib.transforms import Bbox

    renderer = axes.figure.canvas.get_renderer()
    around = [axes.transData.transform(point) for point in points.values()]
    taken = [Bbox([[x - MARGIN, y - MARGIN], [x + MARGIN, y + MARGIN]]) for x, y in around]
    for i, (name, point) in enumerate(points.items()):
        tried = []
        for x, y, align in places:
            text = axes.annotate(name, point, (x, y), textcoords='offset points', fontsize=8, color=f'C{i}', **align)
            box = text.get_window_extent(renderer)
            covered = sum(box.overlaps(other) for other in taken)
            covered += not (axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max))
            tried.append((covered, len(tried), text, box))
            if not covered:
                break
        best = min(tried, key=lambda one: one[:2])
        for _, _, text, _ in tried:
            if text is not best[2]:
                text.remove()
        taken.append(best[3])
