"""Time training steps of several configs in one run: interleaved, medians, as ratios to the first.

python tools/benchmark_training.py configs/baselines/vitti_adapter_cifar100_1k.py configs/dyt/vitti_cifar100_1k.py \
    configs/dyt/vitti_cifar100_1k.py,model.backbone.training=masked --amp --rounds 7
"""

import argparse
import json
import os
import platform
import re
import statistics
import time
from pathlib import Path

from mmdyt import compat

compat.install()

import torch  # noqa: E402
from mmengine.config import Config, DictAction  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import MODELS, init_default_scope  # noqa: E402
from mmengine.runner import Runner, load_checkpoint, set_random_seed  # noqa: E402
from mmengine.utils import import_modules_from_strings  # noqa: E402

from mmdyt import preflight  # noqa: E402


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Time training steps (forward, backward, optimizer) of configs on one batch of their own data. The '
        'configs take turns, so that what else the machine does falls on all of them alike.'
    )
    parser.add_argument(
        'configs', nargs='+', metavar='CONFIG[,KEY=VALUE...]', help='the first is what others are compared with'
    )
    parser.add_argument('--rounds', type=int, default=7, help='timed steps of each config, after one that is not timed')
    parser.add_argument('--threads', type=int, default=1, help='threads of torch on a CPU')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--amp', action='store_true', help='mixed precision, as in tools/train.py')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the times, in seconds')
    return parser.parse_args()


class Step:
    """One config, ready to train on one batch."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.name = name
        self.seconds: list[float] = []
        cfg = self.cfg = read_config(name, args)
        set_random_seed(args.seed)
        import_modules_from_strings(**cfg.get('custom_imports', dict(imports=[])))
        init_default_scope(cfg.get('default_scope', 'mmengine'))
        self.device = 'cuda' if torch.cuda.is_available() else 'cpu'
        self.model = MODELS.build(cfg.model)
        self.model.init_weights()
        if cfg.get('load_from'):
            load_checkpoint(self.model, cfg.load_from, map_location='cpu')
        self.model.to(self.device).train()
        self.optimizer = build_optim_wrapper(self.model, cfg.optim_wrapper)
        loader = dict(cfg.train_dataloader, num_workers=0, persistent_workers=False)
        self.batch = next(iter(Runner.build_dataloader(loader, seed=args.seed)))
        self.scope = cfg.get('default_scope', 'mmengine')

    def run(self) -> float:
        """Seconds of one step."""
        init_default_scope(self.scope)
        self._wait()
        start = time.perf_counter()
        self.model.train_step(self.batch, self.optimizer)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device == 'cuda':
            torch.cuda.synchronize()


def read_config(name: str, args: argparse.Namespace) -> Config:
    """The config of ``CONFIG[,KEY=VALUE...]``, checked as before training."""
    path, *options = re.split(r',(?=[\w.]+=)', name)
    if ',' in path:
        raise ValueError(f'configs must be CONFIG[,KEY=VALUE...], got {path}.')
    values = {key: DictAction._parse_iterable(value) for key, value in (option.split('=', 1) for option in options)}
    cfg = preflight.load_config(
        argparse.Namespace(config=path, cfg_options=values, work_dir=None, launcher='none', local_rank=0)
    )
    if args.amp:
        preflight.use_amp(cfg)
    preflight.check(cfg, loops=('train',))
    return cfg


def report(steps: list[Step], args: argparse.Namespace) -> dict:
    """Medians and ratios, with what they depend on."""
    base = steps[0].seconds
    rows = [
        dict(
            config=step.name,
            median_s=statistics.median(step.seconds),
            # of the ratios within a round: what else the machine did then falls on both
            ratio=statistics.median(mine / first for mine, first in zip(step.seconds, base, strict=True)),
            seconds=step.seconds,
            batch=len(step.batch['inputs']),
        )
        for step in steps
    ]
    device = torch.cuda.get_device_name() if steps[0].device == 'cuda' else f'{platform.machine()} CPU'
    setting = dict(device=device, threads=args.threads, cpus=os.cpu_count(), amp=args.amp, seed=args.seed)
    return dict(setting, torch=torch.__version__, rounds=args.rounds, steps=rows)


def main() -> None:
    """Check everything, then time."""
    args = parse_args()
    with preflight.clean_exit():
        for name in ('rounds', 'threads'):
            if getattr(args, name) < 1:
                raise ValueError(f'--{name} must be at least 1, got {getattr(args, name)}.')
        if args.json and not args.json.resolve().parent.is_dir():
            raise ValueError(f'--json must name a file in an existing folder, got {args.json}.')
        torch.set_num_threads(args.threads)
        steps = [Step(name, args) for name in args.configs]
    for round_ in range(args.rounds + 1):
        for step in steps:
            seconds = step.run()
            if round_:  # the first step allocates and warms up
                step.seconds.append(seconds)
    result = report(steps, args)
    print(
        f'Training step, median of {args.rounds}, {result["device"]}, {args.threads} threads, torch {torch.__version__}'
    )
    for row in result['steps']:
        print(f'{row["median_s"]:9.3f} s{row["ratio"]:7.2f} x  {row["config"]}')
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
