"""What mmdyt.FLOPsHook adds to a training step and to a test epoch, as ratios in one run.

python tools/benchmark_hook.py configs/dyt/vitti_cifar100_1k.py --steps 40 --rounds 5 --images 200 --json cost.json
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from mmdyt import compat

compat.install()

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdyt import preflight
from mmdyt.engine.step_time import device_name
from mmdyt.files import check_out_file, write_json

HOOK = 'mmdyt.FLOPsHook'


class Stopwatch(Hook):
    """Seconds of each training step, all hooks included: it is the first hook of a step, an :class:`End` the last."""

    def __init__(self):
        self.seconds: list[float] = []
        self._start = 0.0

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Start, as the first of the hooks."""
        wait()
        self._start = time.perf_counter()

    def stop(self) -> None:
        """Keep the seconds since the start."""
        wait()
        self.seconds.append(time.perf_counter() - self._start)


class End(Hook):
    """Stops a watch, as the last of the hooks."""

    def __init__(self, watch: Stopwatch):
        self._watch = watch

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Stop it."""
        self._watch.stop()


def wait() -> None:
    """Until a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=f'Time what {HOOK} adds to a config: to steps of a real training in which every second step is '
        'watched, and to test epochs with and without it, which take turns.'
    )
    parser.add_argument('config', help='config file that has the hook')
    parser.add_argument('checkpoint', nargs='?', help='of the test; default: weights as training starts from them')
    parser.add_argument('--steps', type=int, default=40, help='of training, after four that are not timed')
    parser.add_argument('--rounds', type=int, default=5, help='test epochs of each kind, after one that is not timed')
    parser.add_argument('--images', type=int, default=200, help='of a test epoch; for video, clips')
    parser.add_argument('--threads', type=int, default=1, help='threads of torch on a CPU')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the times, in seconds')
    parser.add_argument('--amp', action='store_true', help='train with mixed precision, as in tools/train.py')
    preflight.add_method_arguments(parser)
    parser.add_argument('--cfg-options', nargs='+', action=preflight.KeyValues, help='override settings, key=value')
    return parser.parse_args()


def configs(args: argparse.Namespace, work_dir: str) -> tuple[Config, Config, Config]:
    """The config of the training, of tests with the hook, and of tests without; data are loaded in this process."""
    args.work_dir, args.launcher, args.local_rank = work_dir, 'none', 0
    cfg = preflight.load_config(args)
    hooks = cfg.get('custom_hooks', [])
    if not any(hook['type'] == HOOK for hook in hooks):
        raise ValueError(f'config must have {HOOK} in custom_hooks, got {[hook["type"] for hook in hooks]}.')
    cfg.load_from = args.checkpoint or cfg.get('load_from')
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
    cfg.test_dataloader.dataset.indices = args.images
    if args.amp:
        preflight.use_amp(cfg)
    preflight.check(cfg, loops=('train', 'test'), dry_run=False)
    without = cfg.copy()
    without.custom_hooks = [hook for hook in hooks if hook['type'] != HOOK]
    train = cfg.copy()
    train.train_cfg = dict(type='IterBasedTrainLoop', max_iters=args.steps + 4, val_interval=10**9)
    train.default_hooks.checkpoint = None
    train.custom_hooks = [dict(hook, train_interval=2) if hook['type'] == HOOK else hook for hook in hooks]
    for name, each in dict(train=train, tested=cfg, without=without).items():
        each.experiment_name = name
    return train, cfg, without


def training(cfg: Config) -> dict:
    """Seconds of steps that were watched and of the ones before them."""
    runner = preflight.build_runner(cfg)
    watch = Stopwatch()
    runner.register_hook(watch, 'HIGHEST')
    runner.register_hook(End(watch), 'LOWEST')
    runner.train()
    plain, watched = watch.seconds[4::2], watch.seconds[5::2]  # the hook watches the second, the fourth ...
    return dict(plain_s=plain, watched_s=watched, ratio=paired(watched, plain))


def testing(with_hook: Config, without: Config, rounds: int) -> dict:
    """Seconds of test epochs."""
    seconds: tuple[list, list] = [], []
    runners = [preflight.build_runner(cfg) for cfg in (with_hook, without)]
    for runner in runners:
        runner.test()  # loads and warms up
    for round_ in range(rounds):
        for place in (0, 1) if round_ % 2 else (1, 0):
            seconds[place].append(epoch(runners[place]))
    return dict(with_s=seconds[0], without_s=seconds[1], ratio=paired(*seconds))


def epoch(runner: Runner) -> float:
    """Seconds of a test epoch."""
    start = time.perf_counter()
    runner.test_loop.run()
    wait()
    return time.perf_counter() - start


def paired(mine: list[float], others: list[float]) -> float:
    """The median of the ratios of neighbours in time."""
    return statistics.median(m / o for m, o in zip(mine, others, strict=True))


def main() -> None:
    """Check everything, then time."""
    args = parse_args()
    with preflight.clean_exit(), tempfile.TemporaryDirectory() as folder:
        for name, least in (('steps', 2), ('rounds', 1), ('images', 1), ('threads', 1)):
            if getattr(args, name) < least:
                raise ValueError(f'--{name} must be at least {least}, got {getattr(args, name)}.')
        if args.steps % 2:
            raise ValueError(f'--steps must be even, every second is watched, got {args.steps}.')
        if args.json:
            check_out_file('--json', args.json)
        torch.set_num_threads(args.threads)
        train, with_hook, without = configs(args, folder)
        result = dict(train=training(train), test=testing(with_hook, without, args.rounds))
        setting = dict(config=args.config, device=device_name(), threads=args.threads, cpus=os.cpu_count())
        result = dict(setting, torch=torch.__version__, images=args.images, amp=args.amp, **result)
        print(f'A watched training step takes {result["train"]["ratio"]:.3f} of one that is not (median of pairs);')
        print('the hook watches one in 50 by default.')
        print(f'A test epoch with {HOOK} takes {result["test"]["ratio"]:.3f} of one without.')
        if args.json:
            write_json(args.json, result)


if __name__ == '__main__':
    main()
