"""Results of several methods as one table: means over seeds, cost, parameters, times."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

from mmdyt.engine.runs import FILE, Outcome, read_result

METRICS = ('accuracy/top1', 'mIoU', 'acc/top1')
REPORTED = ('activation_rate', 'gmacs', 'views', 'time', 'data_time')  # beside the metric, by mmdyt's hook and mmengine
COLUMNS = {
    'method': 'method',
    'mean': '{metric} %',
    'std': 'std',
    'seeds': 'seeds',
    'tuned': 'tuned M',
    'head': 'head M',
    'gmacs': 'GMACs',
    'rate': 'rate',
    'step_time': 'step time',
}
DIGITS = dict(mean=2, std=2, tuned=3, head=3, gmacs=3, rate=3, step_time=2)


@dataclass
class Trials:
    """All runs of a method.

    Args:
        method: As it was asked for.
        tuned: Parameters that are trained in the backbone.
        head: Parameters that are trained behind it.
        runs: What each seed gave.
        step_time: How long a training step takes beside a plain adapter's; None if not measured.
    """

    method: str
    tuned: int
    head: int
    runs: dict[int, Outcome] = field(default_factory=dict)
    step_time: float | None = None


def stored(folder: Path) -> dict[Path, dict]:
    """All results of a comparison that lie below ``folder``, by their files; what is broken is passed over."""
    found = {}
    for file in sorted(folder.glob(f'*/{FILE}')):
        try:
            result = read_result(file)
        except ValueError:
            continue
        about = result['about']
        if isinstance(about.get('method'), str) and isinstance(about.get('seed'), int) and about.get('counts'):
            found[file] = result
    return found


def choose_metric(trials: Sequence[Trials]) -> str | None:
    """The metric that all runs have: accuracy or mIoU, else the first that they logged; None without any run."""
    logged = [run.metrics for one in trials for run in one.runs.values() if run.metrics]
    if not logged:
        return None
    names = [name for name in (*METRICS, *logged[0]) if all(name in metrics for metrics in logged)]
    return next((name for name in names if not name.startswith(REPORTED)), None)


def rows(trials: Sequence[Trials], metric: str | None) -> list[dict]:
    """A row of the table for each method, with the names of :data:`COLUMNS`, ``low`` and ``high``.

    Runs that diverged or failed are counted, not averaged. A single run has no ``std``.
    """
    return [_row(one, metric) for one in trials]


def _row(one: Trials, metric: str | None) -> dict:
    done = [run for run in one.runs.values() if run.state == 'done']
    scale = 100 if metric and metric.startswith('acc/') else 1  # mmaction logs fractions
    values = [scale * run.metrics[metric] for run in done if run.metrics.get(metric) is not None]
    costs = [run.metrics.get('gmacs', run.metrics.get('gmacs_dense')) for run in done]
    rates = [run.metrics.get('activation_rate') for run in done]
    states = [run.state for run in one.runs.values()]
    return dict(
        method=one.method,
        mean=mean(values) if values else None,
        std=stdev(values) if len(values) > 1 else None,
        low=min(values, default=None),
        high=max(values, default=None),
        seeds=len(values),
        diverged=states.count('diverged'),
        failed=states.count('failed'),
        tuned=one.tuned / 1e6,
        head=one.head / 1e6,
        gmacs=_mean(costs),
        rate=_mean(rates),
        step_time=one.step_time,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def to_markdown(table: Sequence[Mapping], metric: str | None) -> str:
    """The table for people."""
    head = [title.format(metric=metric or 'metric') for name, title in COLUMNS.items() if name != 'std']
    lines = ['| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|']
    for row in table:
        cells = {name: _cell(row[name], DIGITS.get(name)) for name in COLUMNS}
        if row['std'] is not None:
            cells['mean'] += f' ± {cells["std"]}'
        cells['seeds'] += ''.join(f', {row[name]} {name}' for name in ('diverged', 'failed') if row[name])
        lines.append('| ' + ' | '.join(cells[name] for name in COLUMNS if name != 'std') + ' |')
    return '\n'.join(lines)


def to_csv(table: Sequence[Mapping], metric: str | None) -> str:
    """The table for programs, numbers in full; the metric's name is in a column of its own."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    names = list(table[0]) if table else list(COLUMNS)
    writer.writerow([*names, 'metric'])
    writer.writerows([[*('' if row[name] is None else row[name] for name in names), metric] for row in table])
    return text.getvalue()


def _cell(value, digits: int | None) -> str:
    if value is None:
        return '-'
    return str(value) if digits is None else f'{value:.{digits}f}'
