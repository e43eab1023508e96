"""Run a config on the VTAB-1K tasks under a folder, one after the other; a broken-off run goes on where it was.

python tools/vtab.py configs/dyt/vitb_vtab1k.py [--root data/vtab-1k] [--tasks cifar dtd] [--val] [--seed 1] [--amp]
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean

from mmdyt import compat

compat.install()

from mmengine.config import Config

from mmdyt import preflight
from mmdyt.engine.runs import FILE, Run, known, last_step, train
from mmdyt.files import write_json
from mmdyt.preflight.fingerprint import fingerprint

TRAIN = Path(__file__).with_name('train.py')
METRICS = dict(accuracy='accuracy/top1', activation_rate='activation_rate', gmacs='gmacs')
VAL_LISTS = 'train_dataloader.dataset.ann_file=train800.txt', 'val_dataloader.dataset.ann_file=val200.txt'


def parse_args() -> argparse.Namespace:
    """Read the command line; what is not given stays as the config has it."""
    parser = argparse.ArgumentParser(description='Train and test on VTAB-1K tasks; the last epoch counts.')
    parser.add_argument('config', help='config file on configs/_base_/datasets/vtab1k.py')
    parser.add_argument('--root', type=Path, default=Path('data/vtab-1k'), help='folder of the task folders')
    parser.add_argument('--tasks', nargs='+', metavar='TASK', help='default: all that are there')
    parser.add_argument('--normalization', choices=['half', 'imagenet'], help='of the images')
    parser.add_argument('--val', action='store_true', help='train on train800, test on val200: to choose settings')
    parser.add_argument('--work-dir', type=Path, help='default work_dirs/<config name>')
    parser.add_argument('--seed', type=int)
    parser.add_argument('--amp', action='store_true', help='train with automatic mixed precision')
    parser.add_argument('--method', metavar='NAME[+NAME]', help="use this method instead of the config's")
    parser.add_argument('--method-options', nargs='+', default=[], help='override settings of the method, key=value')
    preflight.add_dry_run_argument(parser)
    parser.add_argument('--cfg-options', nargs='+', default=[], help='override settings, key=value')
    args = parser.parse_args()
    name = '_'.join([Path(args.config).stem, *(args.method or '').split('+')]).strip('_')
    args.work_dir = args.work_dir or Path('work_dirs', name)
    return args


def overrides(args: argparse.Namespace) -> list[str]:
    """Everything that the command line changes in the config, as key=value; ``--cfg-options`` come last and win."""
    options = list(VAL_LISTS) if args.val else []
    if args.normalization:
        options.append(f'model.data_preprocessor.normalization={args.normalization}')
    if args.seed is not None:
        options.append(f'randomness.seed={args.seed}')
    return options + args.cfg_options


def task_run(args: argparse.Namespace, task: str) -> Run:
    """The run of a task; which one it is, the training process reads from the environment, which it inherits."""
    os.environ.update(VTAB_TASK=task, VTAB_ROOT=str(args.root.resolve()))
    folder, options = args.work_dir / task, tuple(overrides(args))
    method = args.method, tuple(args.method_options)
    return Run(task, args.config, folder, options, *method, args.amp, args.dry_run)


def check_tasks(args: argparse.Namespace, groups: dict) -> list[str]:
    """The tasks to run, in the order of VTAB-1K; refuses what is unknown or missing."""
    if not groups:
        raise ValueError(f'config must have _base_/datasets/vtab1k.py as a base, got {args.config}.')
    known = [task for group in groups.values() for task in group]
    for task in args.tasks or []:
        if task not in known:
            raise ValueError(f'--tasks must be among {known}, got {task!r}.')
    if not args.root.is_dir():
        raise FileNotFoundError(f'--root must name an existing folder, got {args.root}.')
    there = [task for task in known if (args.root / task).is_dir()]
    if not there:
        raise FileNotFoundError(f'--root must hold folders named as the tasks {known}, got {args.root} without any.')
    for task in args.tasks or []:
        if task not in there:
            raise FileNotFoundError(f'--tasks must be folders of {args.root}, got {task}. There are {there}.')
    return [task for task in there if not args.tasks or task in args.tasks]


def run_task(args: argparse.Namespace, task: str) -> tuple[dict | None, str]:
    """The result of a task, None if it failed, and its state: from its file if nothing changed, else by training."""
    run = task_run(args, task)
    cfg = preflight.load_config(run.request())
    marks, last = fingerprint(cfg, args.amp), last_step(cfg)
    found = known(run, marks)
    if found:
        print(f'{task}: known from {run.folder / FILE}', flush=True)
    else:
        found = train(run, marks, last, TRAIN)
    result = {name: found.metrics.get(key) for name, key in METRICS.items()}
    if found.state == 'done' and result['accuracy'] is not None:
        print(f'{task}: {result["accuracy"]:.2f} %', flush=True)
        return result, found.state
    reason = 'its loss or a metric is not finite' if found.state == 'diverged' else f'no accuracy of step {last}'
    print(f'{task}: failed, {found.reason or reason}', file=sys.stderr, flush=True)
    return None, found.state


def summarize(results: dict[str, dict], groups: dict) -> dict:
    """Mean of each group, of all tasks and of the group means; None where a task is missing."""
    missing = {name: [task for task in group if task not in results] for name, group in groups.items()}
    accuracy = {task: result['accuracy'] for task, result in results.items()}
    means = {name: None if missing[name] else mean(map(accuracy.get, group)) for name, group in groups.items()}
    complete = not any(missing.values())
    return dict(
        groups=means,
        mean_of_tasks=mean(accuracy.values()) if complete else None,
        mean_of_groups=mean(means.values()) if complete else None,
        missing={name: tasks for name, tasks in missing.items() if tasks},
    )


def report(results: dict[str, dict], summary: dict, groups: dict, diverged: Sequence[str] = ()) -> str:
    """A table for people."""

    def cell(value: float | None, width: int, digits: int) -> str:
        return f'{"-":>{width}}' if value is None else f'{value:>{width}.{digits}f}'

    lines = [f'{"task":<24}{"accuracy %":>12}{"rate":>8}{"GMACs":>10}']
    for task, result in results.items():
        numbers = cell(result['accuracy'], 12, 2) + cell(result['activation_rate'], 8, 3) + cell(result['gmacs'], 10, 3)
        lines.append(f'{task:<24}{numbers}')
    lines += [f'{task:<24}{"diverged":>12}' for task in diverged]
    means = {f'{name} ({len(groups[name])})': value for name, value in summary['groups'].items()}
    means[f'mean of {sum(map(len, groups.values()))} tasks'] = summary['mean_of_tasks']
    means['mean of group means'] = summary['mean_of_groups']
    lines += ['', *(f'{name:<24}{cell(value, 12, 2)}' for name, value in means.items())]
    lines += [f'No mean of {name}: {", ".join(tasks)} missing.' for name, tasks in summary['missing'].items()]
    return '\n'.join([*lines, 'GMACs are MACs per image (papers print them as FLOPs).'])


def settings(args: argparse.Namespace, cfg: Config) -> dict:
    """What the results depend on, read from the config that runs."""
    return dict(
        config=args.config,
        options=overrides(args),
        method=args.method,
        method_options=args.method_options,
        tested_on=cfg.val_dataloader.dataset.ann_file,
        epochs=cfg.train_cfg.get('max_epochs'),
        seed=cfg.randomness.seed,
        normalization=cfg.model.data_preprocessor.get('normalization'),
        amp=args.amp,
        versions={name: version(name) for name in ('mmdyt', 'mmpretrain', 'mmengine', 'torch')},
    )


def main() -> None:
    """Check what the user typed, run the tasks, print and write."""
    args = parse_args()
    with preflight.clean_exit():
        cfg = preflight.load_config(task_run(args, 'cifar').request())  # any task's tells which ones there are
        groups = cfg.get('vtab_groups', {})
        tasks, ran_with = check_tasks(args, groups), settings(args, cfg)
    found = {task: run_task(args, task) for task in tasks}
    results = {task: result for task, (result, _) in found.items() if result}
    diverged = [task for task, (_, state) in found.items() if state == 'diverged']
    summary = summarize(results, groups)
    print('\n' + report(results, summary, groups, diverged))
    failed = [task for task in tasks if task not in results]
    file = args.work_dir / 'vtab.json'
    write_json(file, ran_with | dict(tasks=results, failed=failed, diverged=diverged) | summary)
    print(f'Written to {file}.')
    if failed:
        sys.exit(1)


if __name__ == '__main__':
    main()
