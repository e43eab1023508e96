"""What runs left in their work dirs: scalars, costs of images, pictures, configs."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

CURVES = 'vis_data/scalars.json'
PICTURES = ('*.png', '*.jpg')
STEPS = ('step', 'iter', 'epoch')  # of a line, no values of it

Points = list[tuple[float, float]]
ReadConfig = Callable[[str, str], dict]


class Run(NamedTuple):
    """One run.

    Attributes:
        name: Of its work dir.
        curves: Points (step, value) by the name of a scalar.
        final: The last metrics of validation, and of a test as ``test/...``.
        seconds: Of the logged training steps; None where none is logged.
        costs: Multiply-adds of the images of the last validation or test, in 10^9.
        pictures: Files, newest first.
        config: Values by dotted key; empty where it cannot be read as plain values.
        broken: Lines of logs that could not be read.
    """

    name: str
    curves: dict[str, Points]
    final: dict[str, float]
    seconds: float | None
    costs: list[float]
    pictures: list[Path]
    config: dict[str, Any]
    broken: int


def read_runs(folders: Sequence[Path], read_config: ReadConfig) -> list[Run]:
    """The runs of work dirs; a folder of ``tools/compare.py`` gives those under it.

    Args:
        folders: Work dirs.
        read_config: ``(text, path)`` gives the values of a config without running it, or raises ``ValueError``.

    Raises:
        ValueError: If a folder is none, or holds no run.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f'WORK_DIR must be a folder, got {folder}.')
        runs = [one for one in (folder, *sorted(folder.glob('runs/*'))) if _logs(one)]
        if not runs:
            raise ValueError(f'WORK_DIR must hold a run (TIMESTAMP/vis_data), got {folder} without one.')
        found |= dict.fromkeys(runs)
    names = _names(list(found))
    return [_read(folder, name, read_config) for folder, name in zip(found, names, strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    for number in range(1, max(map(len, paths)) + 1):
        names = ['/'.join(parts[-number:]) for parts in paths]
        if len({*names}) == len(names):
            break
    return names


def _logs(folder: Path) -> list[Path]:
    """Folders of single starts, by time."""
    return sorted(one for one in folder.iterdir() if (one / 'vis_data').is_dir()) if folder.is_dir() else []


def _read(folder: Path, name: str, read_config: ReadConfig) -> Run:
    logs, curves, final, broken = _logs(folder), {}, {}, 0
    for log in logs:
        rows, unread = read_lines(log / CURVES)
        broken += unread
        join(curves, rows)
        final |= _metrics(rows)
        tested, unread = read_lines(log / f'{log.name}.json')
        broken += unread
        for row in tested:
            final |= {f'test/{key}': value for key, value in _numbers(row).items()}
    costs, unread = _costs(logs)
    times = curves.get('time', [])
    pictures = [picture for log in reversed(logs) for kind in PICTURES for picture in sorted(log.rglob(kind))]
    return Run(
        name=name,
        curves=curves,
        final=final,
        seconds=_seconds(times),
        costs=costs,
        pictures=pictures,
        config=_config(logs, read_config),
        broken=broken + unread,
    )


def read_lines(file: Path) -> tuple[list[dict], int]:
    """Objects of a file of JSON lines, and how many lines are none: the last one, where a run was killed."""
    rows, broken = [], 0
    for line in file.read_text('utf-8', 'replace').splitlines() if file.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken += bool(line.strip())
    return rows, broken


def join(curves: dict[str, Points], rows: Sequence[Mapping]) -> None:
    """Go on with curves; a run that was resumed repeats steps, and its own count."""
    new: dict[str, Points] = {}
    for row in rows:
        step, kind = _step(row), '' if _trains(row) else 'val/'  # which may count epochs, not steps
        for key, value in _numbers(row).items():
            new.setdefault(kind + key, []).append((step, value))
    for key, points in new.items():
        before = [point for point in curves.get(key, []) if point[0] < points[0][0]]
        curves[key] = before + points


def _step(row: Mapping) -> float:
    return next((row[name] for name in STEPS if _is_number(row.get(name))), 0)


def _numbers(row: Mapping) -> dict[str, float]:
    """What of a line is a finite number, but for its place."""
    return {key: float(value) for key, value in row.items() if key not in STEPS and _is_number(value)}


def _is_number(value: Any) -> bool:
    """Whether JSON's number is one that is finite; whole ones may be too large to be."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _trains(row: Mapping) -> bool:
    """Whether a line is of training steps."""
    return any(key in ('lr', 'loss') or key.startswith('train/') for key in row)


def _metrics(rows: Sequence[Mapping]) -> dict[str, float]:
    """Of the last validation."""
    return next((_numbers(row) for row in reversed(rows) if not _trains(row)), {})


def _seconds(times: Points) -> float | None:
    """Each value is the mean over the steps since the one before."""
    if not times:
        return None
    before = [0.0, *(step for step, _ in times[:-1])]
    return sum((step - last) * value for (step, value), last in zip(times, before, strict=True))


def _costs(logs: Sequence[Path]) -> tuple[list[float], int]:
    """Those of the newest file, and lines that are none."""
    for log in reversed(logs):
        for file in (log / 'costs_test.jsonl', log / 'costs_val.jsonl'):
            rows, broken = read_lines(file)
            found = [row['gmacs'] for row in map(_numbers, rows) if 'gmacs' in row]
            if found:
                return found, broken
    return [], 0


def _config(logs: Sequence[Path], read_config: ReadConfig) -> dict[str, Any]:
    for log in reversed(logs):
        file = log / 'vis_data' / 'config.py'
        if file.is_file():
            try:
                return dict(_flat(read_config(file.read_text('utf-8'), str(file))))
            except (OSError, ValueError):
                return {}
    return {}


def _flat(value: Any, key: str = '') -> Iterator[tuple[str, Any]]:
    """Leaves by dotted key."""
    if isinstance(value, Mapping) and value:
        inner = ((str(name), child) for name, child in value.items())
    elif isinstance(value, list | tuple) and any(isinstance(one, Mapping) for one in value):
        inner = ((str(index), child) for index, child in enumerate(value))
    else:
        yield key, value
        return
    for name, child in inner:
        yield from _flat(child, f'{key}.{name}'.lstrip('.'))
