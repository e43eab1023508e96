"""Training runs that are known once they are done: each in a process of its own, its result in a file.

A result is used again while all that it depends on is the same; see :mod:`mmdyt.preflight.fingerprint`.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmengine.config import Config, DictAction

from mmdyt.engine.finite import EXIT_CODE as NOT_FINITE
from mmdyt.files import hold, write_json

FORMAT = 1  # of a result's file
FILE, STARTED, OUTPUT, LOCK = 'result.json', 'started.json', 'output.txt', '.run.lock'


@dataclass(frozen=True)
class Run:
    """A training run as tools/train.py is told it.

    Args:
        name: What messages call it.
        config: Path of the config.
        folder: Its work dir, in which the result is kept.
        options: Overrides of the config, ``key=value``; the last one wins.
        method: Of ``--method``; None leaves the config's.
        method_options: Of ``--method-options``, ``key=value``.
        amp: Whether it trains with mixed precision.
        dry_run: Whether it tries one sample of each data set first.
    """

    name: str
    config: str
    folder: Path
    options: tuple[str, ...] = ()
    method: str | None = None
    method_options: tuple[str, ...] = ()
    amp: bool = False
    dry_run: bool = True

    def request(self) -> argparse.Namespace:
        """What :func:`mmdyt.preflight.load_config` reads.

        Raises:
            ValueError: If an option is not ``key=value``.
        """
        return argparse.Namespace(
            config=self.config,
            cfg_options=parse_options('--cfg-options', self.options),
            method=self.method,
            method_options=parse_options('--method-options', self.method_options),
            work_dir=str(self.folder),
            launcher='none',
            local_rank=0,
        )

    def command(self, script: Path, resume: Path | None = None) -> list[str]:
        """The command line that trains and tests it, from ``resume`` on if that is a checkpoint."""
        options = [
            *['--amp'] * self.amp,
            *['--no-dry-run'] * (not self.dry_run),
            *(['--resume', resume] if resume else []),
            *(['--method', self.method] if self.method else []),
            *(['--method-options', *self.method_options] if self.method_options else []),
            *(['--cfg-options', *self.options] if self.options else []),
        ]
        return [str(part) for part in (sys.executable, script, self.config, '--work-dir', self.folder, *options)]


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Args:
        state: ``'done'``, ``'diverged'`` (a loss, weight, prediction or metric was not finite) or ``'failed'``.
        metrics: Of the last validation; empty if it failed or was stopped. Those that are not finite are None.
        reason: Why it failed or was stopped, as far as the run said.
        seconds: That it took; None if it failed.
    """

    state: str
    metrics: Mapping[str, float | None]
    reason: str = ''
    seconds: float | None = None


def split_word(word: str) -> tuple[str, tuple[str, ...]]:
    """``HEAD[,KEY=VALUE...]`` as its head and its options; values may have commas."""
    head, *options = re.split(r',(?=[\w.]+=)', word)
    return head, tuple(options)


def parse_options(name: str, options: Sequence[str]) -> dict:
    """Options ``key=value`` as the tools read them.

    Args:
        name: Of the argument they were given with, for the message.
        options: As typed.

    Raises:
        ValueError: If one is not ``key=value``.
    """
    for option in options:
        if '=' not in option:
            raise ValueError(f'{name} must be key=value, got {option}.')
    parser = argparse.ArgumentParser()
    parser.add_argument('options', nargs='*', action=DictAction)
    return parser.parse_args(['--', *options]).options or {}


def known(run: Run, marks: Mapping[str, str]) -> Outcome | None:
    """The result of a run from its file, if it has the same fingerprint ``marks``; says why a file is of no use."""
    file = run.folder / FILE
    if not file.exists():
        return None
    try:
        result = read_result(file)
    except ValueError as error:
        print(f'{run.name}: trains again, {error}', flush=True)
        return None
    changed = [name for name in {**marks, **result['marks']} if marks.get(name) != result['marks'].get(name)]
    if changed:
        print(f'{run.name}: trains again, {file} was written with another {", ".join(changed)}', flush=True)
        return None
    return outcome(result)


def read_result(file: Path) -> dict:
    """The content of a result's file.

    Raises:
        ValueError: If it is none: broken, of another program or of another version of this one.
    """
    try:
        result = json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise ValueError(f'{file} is broken ({type(error).__name__})') from error
    if not isinstance(result, dict) or result.get('format') != FORMAT:
        raise ValueError(f'{file} is no result of this version')
    kinds = dict(marks=dict, metrics=dict, state=str, seconds=int | float, about=dict)
    wrong = [name for name, kind in kinds.items() if not isinstance(result.get(name), kind)]
    if wrong or result['state'] not in ('done', 'diverged'):
        raise ValueError(f'{file} is no result: {", ".join(wrong or ["state"])} missing or wrong')
    return result


def outcome(result: Mapping) -> Outcome:
    """What a result's file says."""
    return Outcome(result['state'], result['metrics'], seconds=result['seconds'])


def train(run: Run, marks: Mapping[str, str], last: int | None, script: Path, about: Mapping | None = None) -> Outcome:
    """Train and test in a process of its own, whose output goes to a file; keep the result.

    A run that was broken off goes on from its latest checkpoint, if nothing that it depends on has changed.

    Args:
        run: What to train.
        marks: Its fingerprint.
        last: Of :func:`last_step`.
        script: ``tools/train.py``.
        about: More to keep with the result.
    """
    try:
        held = hold(run.folder, LOCK)  # another lock than that of the training process itself
    except OSError as error:  # another process trains there, or the folder cannot be made
        return Outcome('failed', {}, str(error))
    with held:
        return _train(run, marks, last, script, about)


def _train(run: Run, marks: Mapping[str, str], last: int | None, script: Path, about: Mapping | None) -> Outcome:
    """As :func:`train`, in a folder that nobody else writes to."""
    (run.folder / FILE).unlink(missing_ok=True)
    resume = _checkpoint(run.folder, marks, last)
    if resume is None:
        write_json(run.folder / STARTED, dict(marks=dict(marks)))
    output = run.folder / OUTPUT
    print(f'{run.name}: {f"goes on from {resume.name}" if resume else "trains"}, see {output}', flush=True)
    start = time.monotonic()
    with output.open('a' if resume else 'w', encoding='utf-8') as file:
        code = subprocess.run(run.command(script, resume), stdout=file, stderr=subprocess.STDOUT).returncode
    metrics = {} if code == NOT_FINITE else None if code else last_validation(run.folder, last)
    if metrics is None:
        reason = _last_line(output) if code else f'its log has no validation of the last step{f", {last}" * bool(last)}'
        return Outcome('failed', {}, reason)
    finite = not code and all(map(math.isfinite, [*metrics.values(), last_loss(run.folder)]))
    found = dict(
        format=FORMAT,
        run=dict(config=run.config, options=run.options, method=run.method, method_options=run.method_options),
        amp=run.amp,
        marks=dict(marks),
        state='done' if finite else 'diverged',
        metrics={name: value if math.isfinite(value) else None for name, value in metrics.items()},
        seconds=time.monotonic() - start,
        about=dict(about or {}),
    )
    write_json(run.folder / FILE, found)
    return replace(outcome(found), reason=_last_line(output) if code else '')


def last_step(cfg: Config) -> int | None:
    """The step of the last validation as it is logged: an epoch or an iteration; None where the config does not say."""
    logger = (cfg.get('default_hooks') or {}).get('logger') or {}
    return cfg.train_cfg.get('max_epochs' if logger.get('log_metric_by_epoch', True) else 'max_iters')


def last_validation(folder: Path, last: int | None) -> dict[str, float] | None:
    """The metrics that the latest run in ``folder`` logged at its end; None if it was not tested there.

    Args:
        folder: Work dir of the run.
        last: The step that must have been tested; None is any.
    """
    rows = _log(folder)
    tests = [row for row in rows if not _is_training(row) and last in (None, row.get('step'))]
    if not tests:
        return None
    return {name: value for name, value in tests[-1].items() if name != 'step' and isinstance(value, int | float)}


def last_loss(folder: Path) -> float:
    """The last loss that the latest run in ``folder`` logged; 0 if none."""
    return next((row['loss'] for row in reversed(_log(folder)) if 'loss' in row), 0.0)


def _checkpoint(folder: Path, marks: Mapping[str, str], last: int | None) -> Path | None:
    """The latest checkpoint to go on from, if a run of this fingerprint wrote it; the one at the end is of no use."""
    started = folder / STARTED
    try:
        if json.loads(started.read_text(encoding='utf-8'))['marks'] != dict(marks):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    found = {}
    for path in folder.glob('*.pth'):
        name = re.fullmatch(r'(?:epoch|iter)_(\d+)\.pth', path.name)
        whole = name and path.stat().st_mtime >= started.stat().st_mtime and zipfile.is_zipfile(path)
        if whole and (last is None or int(name[1]) < last):
            found[int(name[1])] = path
    return found[max(found)] if found else None


def _log(folder: Path) -> list[dict]:
    """The rows that the latest run in a work dir logged."""
    logs = sorted(folder.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in logs[-1].read_text(encoding='utf-8').splitlines()] if logs else []


def _is_training(row: Mapping) -> bool:
    return 'loss' in row or 'iter' in row


def _last_line(file: Path) -> str:
    lines = file.read_text(encoding='utf-8', errors='replace').split('\n')
    return next((line.strip() for line in reversed(lines) if line.strip()), 'no output')
