"""Time training steps of several configs in one run, and their memory: interleaved, medians, as ratios to the first.

python tools/benchmark_training.py configs/dyt/vitti_cifar100_1k.py \
    configs/dyt/vitti_cifar100_1k.py,model.backbone.training=masked --amp --rounds 7
python tools/benchmark_training.py configs/dyt/vitti_cifar100_1k.py --methods adapter lora,rank=4 dyt --amp
python tools/benchmark_training.py configs/dyt/vitti_cifar100_1k.py \
    configs/dyt/vitti_cifar100_1k.py,model.backbone.with_cp=True --memory
"""

import argparse
import os
import statistics
from pathlib import Path

from mmdyt import compat

compat.install()

import torch
from mmengine.config import Config

from mmdyt import preflight
from mmdyt.engine.runs import Run, split_word
from mmdyt.engine.step_time import Step, device_name, ratio, take_turns
from mmdyt.files import check_out_file, write_json


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Time training steps (forward, backward, optimizer) of configs on one batch of their own data. The '
        'configs take turns, so that what else the machine does falls on all of them alike.'
    )
    parser.add_argument(
        'configs', nargs='+', metavar='CONFIG[,KEY=VALUE...]', help='the first is what others are compared with'
    )
    parser.add_argument(
        '--methods', nargs='+', metavar='NAME[+NAME][,KEY=VALUE...]', help='time each config with each of these methods'
    )
    parser.add_argument('--rounds', type=int, default=7, help='timed steps of each config, after one that is not timed')
    parser.add_argument('--threads', type=int, default=1, help='threads of torch on a CPU')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--amp', action='store_true', help='mixed precision, as in tools/train.py')
    parser.add_argument('--memory', action='store_true', help='measure what a step adds to the memory at its peak, too')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the times, in seconds, and megabytes')
    return parser.parse_args()


def read_config(name: str, method: str | None, amp: bool) -> Config:
    """The config of ``CONFIG[,KEY=VALUE...]`` with ``METHOD[,KEY=VALUE...]``, checked as before training."""
    path, options = split_word(name)
    if ',' in path:
        raise ValueError(f'configs must be CONFIG[,KEY=VALUE...], got {path}.')
    word, settings = split_word(method) if method else (None, ())
    cfg = preflight.load_config(Run(name, path, Path(), options, word, settings).request())
    if amp:
        preflight.use_amp(cfg)
    preflight.check(cfg, loops=('train',), dry_run=False)
    return cfg


def report(steps: list[Step], args: argparse.Namespace, memory: list[float | None]) -> dict:
    """Medians, ratios and memory, with what they depend on."""
    rows = [
        dict(
            config=step.name,
            median_s=statistics.median(step.seconds),
            ratio=ratio(step, steps[0]),
            seconds=step.seconds,
            batch=len(step.batch['inputs']),
            memory_mb=added,
        )
        for step, added in zip(steps, memory, strict=True)
    ]
    setting = dict(device=device_name(), threads=args.threads, cpus=os.cpu_count(), amp=args.amp, seed=args.seed)
    return dict(setting, torch=torch.__version__, rounds=args.rounds, steps=rows)


def main() -> None:
    """Check everything, then time."""
    args = parse_args()
    with preflight.clean_exit():
        for name in ('rounds', 'threads'):
            if getattr(args, name) < 1:
                raise ValueError(f'--{name} must be at least 1, got {getattr(args, name)}.')
        if args.json:
            check_out_file('--json', args.json)
        torch.set_num_threads(args.threads)
        steps = [
            Step(' '.join([name, *[method] * bool(method)]), read_config(name, method, args.amp), args.seed)
            for name in args.configs
            for method in args.methods or [None]
        ]
    take_turns(steps, args.rounds)
    result = report(steps, args, [step.memory() if args.memory else None for step in steps])
    print(
        f'Training step, median of {args.rounds}, {result["device"]}, {args.threads} threads, torch {torch.__version__}'
    )
    for row in result['steps']:
        memory = f'{row["memory_mb"]:9.1f} MB' if args.memory else ''
        print(f'{row["median_s"]:9.3f} s{row["ratio"]:7.2f} x{memory}  {row["config"]}')
    if args.json:
        with preflight.clean_exit():
            write_json(args.json, result)


if __name__ == '__main__':
    main()
