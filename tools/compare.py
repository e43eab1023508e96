"""Train methods on one config, each with some seeds, and put them into one table; a broken-off run goes on.

python tools/compare.py configs/dyt/vitti_cifar100_1k.py --methods linear lora,rank=4 adapter dyt --seeds 0 1 2 --amp
"""

import argparse
import io
import json
import re
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

from mmdyt import compat

compat.install()

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope

from mmdyt import preflight
from mmdyt.engine.comparison import Trials, choose_metric, rows, stored, to_csv, to_markdown
from mmdyt.engine.comparison_plot import plot
from mmdyt.engine.runs import FILE, Outcome, Run, known, last_step, outcome, split_word, train
from mmdyt.engine.shapes import shapes_only
from mmdyt.engine.step_time import StepTimes, device_name
from mmdyt.files import write_json, write_text
from mmdyt.preflight.fingerprint import digest, fingerprint, versions

TRAIN = Path(__file__).with_name('train.py')
BASE = 'adapter'  # whose step time is 1
NOT_FINITE = 'its loss or a metric is not finite'
NOTE = (
    'Mean ± standard deviation over seeds. Tuned parameters are those of the backbone, the head comes on top. GMACs '
    "are MACs per sample (papers print them as FLOPs). Step time: of a training step, beside a plain adapter's."
)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Train and test methods on one config, one run after the other. What is known is not trained '
        'again; results that lie in the work dir from earlier calls with the same config stay in the table.'
    )
    parser.add_argument('config', help='config file; its own method does not matter')
    parser.add_argument(
        '--methods', nargs='+', required=True, metavar='NAME[+NAME][,KEY=VALUE...]', help='as of train.py, with options'
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument('--amp', action='store_true', help='train with automatic mixed precision')
    parser.add_argument('--work-dir', type=Path, help='default work_dirs/compare_<config name>')
    parser.add_argument('--no-timing', action='store_true', help='leave step times out')
    parser.add_argument('--rounds', type=int, default=7, help='timed steps of each method')
    parser.add_argument(
        '--any-source',
        action='store_true',
        help="let results count that another state of mmdyt's source or other versions of its libraries gave",
    )
    preflight.add_dry_run_argument(parser)
    parser.add_argument('--cfg-options', nargs='+', default=[], help='override settings of the config, key=value')
    args = parser.parse_args()
    args.work_dir = args.work_dir or Path('work_dirs', f'compare_{Path(args.config).stem}')
    return args


class Comparison:
    """The runs that were asked for, and what is known of them and of earlier ones in the same work dir.

    Args:
        args: The command line.

    Raises:
        ValueError: If an option is wrong, or a method cannot be trained.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.failed: dict[tuple[str, int], Outcome] = {}
        self.counts: dict[str, dict[str, int]] = {}
        self._rank: dict[Path, int] = {}
        self._check_arguments()
        for method in args.methods:
            with preflight.part(method, 'be trained'):  # whatever is wrong, the user wants to know with which method
                cfg = self.load(method, args.seeds[0])
                preflight.check(cfg, loops=('train', 'val'), dry_run=args.dry_run)
                self.counts[method] = count_tuned(cfg)

    def _check_arguments(self) -> None:
        """Refuse what is wrong whatever the method."""
        args = self.args
        for name in ('methods', 'seeds'):
            given = getattr(args, name)
            alike = [sorted(str(value).split(',')) for value in given]  # the order of options makes no other method
            if twice := [value for value, key in zip(given, alike, strict=True) if alike.count(key) > 1]:
                raise ValueError(f'--{name} must differ, got {twice[-1]} twice.')
        if args.rounds < 1:
            raise ValueError(f'--rounds must be at least 1, got {args.rounds}.')
        if args.work_dir.exists() and not args.work_dir.is_dir():
            raise ValueError(f'--work-dir must be a folder, got {args.work_dir}.')
        if self.load(None, args.seeds[0]).get('val_dataloader') is None:
            raise ValueError(f'config must set val_dataloader, got none in {args.config}.')

    def run(self, method: str | None, seed: int | None, name: str = '', folder: str = '') -> Run:
        """A run as tools/train.py is told it; no method and no seed are the config's own."""
        args = self.args
        head, options = (None, ()) if method is None else split_word(method)
        seeds = [] if seed is None else [f'randomness.seed={seed}']
        return Run(
            name,
            args.config,
            args.work_dir / folder,
            (*args.cfg_options, *seeds),
            head,
            options,
            args.amp,
            args.dry_run,
        )

    def load(self, method: str | None, seed: int | None) -> Config:
        """The config that a run trains with."""
        cfg = preflight.load_config(self.run(method, seed).request())
        if self.args.amp:
            preflight.use_amp(cfg)
        return cfg

    def marks(self, method: str, seed: int | None) -> dict[str, str]:
        """The fingerprint of a run."""
        return fingerprint(self.load(method, seed), self.args.amp)

    def same(self, marks: Mapping, others: Mapping) -> bool:
        """Whether two fingerprints are of one comparison."""
        free = {'source', 'versions'} if self.args.any_source else set()
        return all(marks.get(key) == others.get(key) for key in {*marks, *others} - free)

    def do(self, method: str, seed: int, name: str) -> tuple[Outcome, bool]:
        """The outcome of a run, and whether it was known."""
        marks = self.marks(method, seed)
        # the folder's name says what the run depends on: a setting that changes never costs an earlier result
        folder = re.sub(r'[^\w.+=-]+', '_', f'{method}-seed{seed}-{digest(marks)[:8]}')
        run = self.run(method, seed, name, f'runs/{folder}')
        if not (run.folder / FILE).exists():
            run, marks = self._earlier(run, method, seed, marks)
        self._rank[run.folder / FILE] = 2
        if found := known(run, marks):
            print(f'{name}: known from {run.folder / FILE}', flush=True)
            return found, True
        cfg = self.load(method, seed)
        about = dict(method=method, seed=seed, counts=self.counts[method], versions=versions(cfg), device=device_name())
        found = train(run, marks, last_step(cfg), TRAIN, about)
        if found.state == 'failed':
            self.failed[method, seed] = found
        if found.state != 'done':
            print(f'{name}: {found.state}, {found.reason or NOT_FINITE}', file=sys.stderr, flush=True)
        return found, False

    def _earlier(self, run: Run, method: str, seed: int, marks: dict) -> tuple[Run, dict]:
        """The same run of another source, if that may count; otherwise says why earlier results do not."""
        for file, result in stored(self.args.work_dir / 'runs').items():
            if (result['about']['method'], result['about']['seed']) == (method, seed):
                if self.same(marks, result['marks']):
                    return replace(run, folder=file.parent), result['marks']
                changed = [key for key in marks if result['marks'].get(key) != marks[key]]
                print(f'{run.name}: not as in {file.parent}, which had another {", ".join(changed)}', flush=True)
        return run, marks

    def _ranked(self, file: Path, result: dict) -> int:
        """How well a result has the settings of this comparison: 0 not, 1 but for source and versions, 2 wholly."""
        if file not in self._rank:
            try:
                marks = self.marks(result['about']['method'], result['about']['seed'])
            except (LookupError, OSError, TypeError, ValueError):  # a method that there is no more
                marks = {}
            self._rank[file] = self.same(marks, result['marks']) + (marks == result['marks'])
        return self._rank[file]

    def results(self) -> dict[tuple[str, int], dict]:
        """Results with the settings of this comparison by method and seed, those of earlier calls too."""
        found = stored(self.args.work_dir / 'runs')
        ranked = sorted(found, key=lambda file: self._ranked(file, found[file]))  # the best comes last and stays
        about = [(found[file]['about'], found[file]) for file in ranked if self._ranked(file, found[file])]
        return {(about['method'], about['seed']): result for about, result in about}


def gather(comparison: Comparison, times: Mapping[str, Mapping]) -> list[Trials]:
    """All results, and what failed now, by method: first those that were asked for."""
    found = {method: Trials(method, **comparison.counts[method]) for method in comparison.args.methods}
    for (method, seed), result in comparison.results().items():
        one = found.setdefault(method, Trials(method, **result['about']['counts']))
        one.runs[seed] = outcome(result)
    for (method, seed), run in comparison.failed.items():
        found[method].runs[seed] = run
    for one in found.values():
        one.step_time = times.get(one.method, {}).get('ratio')
    return list(found.values())


def count_tuned(cfg: Config) -> dict[str, int]:
    """Trained parameters of the backbone, and of all behind it."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    with shapes_only():
        model = MODELS.build(cfg.model)
    tuned = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    backbone = sum(number for name, number in tuned.items() if name.startswith('backbone.'))
    return dict(tuned=backbone, head=sum(tuned.values()) - backbone)


def write(comparison: Comparison, times: Mapping[str, Mapping]) -> str:
    """Write table, numbers and picture; returns the table."""
    args, trials = comparison.args, gather(comparison, times)
    metric = choose_metric(trials)
    table = rows(trials, metric)
    failed = [f'{m} seed {s}: failed, {run.reason}' for (m, s), run in comparison.failed.items()]
    results = comparison.results().values()
    sources = {result['marks']['source'] for result in results}
    machines = {json.dumps({key: result['about'].get(key) for key in ('device', 'versions')}) for result in results}
    mixed = [f"The results are of {len(sources)} states of mmdyt's source."] if len(sources) > 1 else []
    if len(machines) > 1:
        mixed.append(f'They are of {len(machines)} kinds of machine or versions of the libraries.')
    text = '\n\n'.join([to_markdown(table, metric), NOTE, *mixed, *failed])
    runs = {one.method: {seed: vars(run) for seed, run in sorted(one.runs.items())} for one in trials}
    content = dict(
        command=sys.argv,
        config=args.config,
        options=args.cfg_options,
        amp=args.amp,
        device=device_name(),
        versions=versions(comparison.load(None, None)),
        sources=sorted(sources),
        machines=[json.loads(machine) for machine in sorted(machines)],
        metric=metric,
        methods=[row | dict(runs=runs[row['method']], timing=times.get(row['method'])) for row in table],
    )
    args.work_dir.mkdir(parents=True, exist_ok=True)
    write_text(args.work_dir / 'compare.md', f'# {args.config}\n\n{text}\n')
    write_text(args.work_dir / 'compare.csv', to_csv(table, metric))
    write_json(args.work_dir / 'compare.json', content)
    plot(table, metric, args.work_dir / 'compare.png')
    return text


def train_all(comparison: Comparison, times: Mapping[str, Mapping]) -> None:
    """Do what was asked for, the first seed of every method first; tables are up to date after each run."""
    args = comparison.args
    todo = [(method, seed) for seed in args.seeds for method in args.methods]
    took = []
    for i, (method, seed) in enumerate(todo, 1):
        name = f'[{i}/{len(todo)}] {method} seed {seed}'
        start = time.monotonic()
        found, was_known = comparison.do(method, seed, name)
        if was_known:
            continue
        took.append(time.monotonic() - start)
        left = len(todo) - i
        about = timedelta(seconds=round(left * sum(took) / len(took)))
        more = f'; {left} to go, about {about} if none is known' if left else ''
        print(f'{name}: {found.state} in {timedelta(seconds=round(took[-1]))}{more}', flush=True)
        write(comparison, times)


def time_all(comparison: Comparison, times: StepTimes) -> None:
    """Measure the step times that are not known, of the methods that were asked for."""
    for method in [] if comparison.args.no_timing else comparison.args.methods:
        if method not in times.known():
            print(f'{method}: step time, beside {BASE}', flush=True)
            try:
                with redirect_stdout(io.StringIO()):  # mmengine tells each weight file that it reads
                    times.measure(method)
            except RuntimeError as error:  # such as too little memory: the results are worth more than their times
                print(f'{method}: no step time, {error}', file=sys.stderr, flush=True)


def main() -> None:
    """Check what the user typed, train, time, print and write."""
    args = parse_args()
    MMLogger.get_instance('compare', log_level='ERROR')  # else every weight that starts at random is told
    with preflight.clean_exit():
        comparison = Comparison(args)
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # steps are timed in this process, with the source as it is now
    load, marks = partial(comparison.load, seed=None), cache(partial(comparison.marks, seed=None))
    times, stopped = StepTimes(args.work_dir / 'steps.json', BASE, args.rounds, load, marks, comparison.same), False
    try:
        train_all(comparison, times.known())
        time_all(comparison, times)
    except KeyboardInterrupt:
        stopped = True
    print(f'\n{write(comparison, times.known())}\n\nWritten to {args.work_dir}/compare.md, .csv, .json and .png.')
    if stopped:
        print('Stopped. What is done is kept: the same command goes on.', file=sys.stderr)
        sys.exit(130)
    if comparison.failed:
        sys.exit(1)


if __name__ == '__main__':
    main()
