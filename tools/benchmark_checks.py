"""Time what tools/train.py does before work starts: imports, checks, and the trial of one sample of each data set.

python tools/benchmark_checks.py configs/dyt/vitti_cifar100_1k.py [--repeats 3] [--cfg-options KEY=VALUE]
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Time the checks before training, each time in a new process.')
    parser.add_argument('config', help='config file')
    parser.add_argument('--repeats', type=int, default=3, help='the median of so many')
    parser.add_argument('--threads', type=int, default=1, help='threads of torch on a CPU')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='override settings of the config, key=value')
    args = parser.parse_args()
    for name in ('repeats', 'threads'):
        if getattr(args, name) < 1:
            parser.error(f'--{name} must be at least 1, got {getattr(args, name)}.')
    return args


def measure(config: str, options: list[str], threads: int, dry_run: bool) -> tuple[float, float, float, float]:
    """Seconds of imports and of checks, each on the clock and of the processor; nothing is imported before."""
    start = time.perf_counter(), time.process_time()
    from mmdyt import compat

    compat.install()

    import torch
    from mmengine.utils import import_modules_from_strings

    from mmdyt import preflight
    from mmdyt.engine.runs import Run

    torch.set_num_threads(threads)
    with preflight.clean_exit():
        cfg = preflight.load_config(Run('', config, Path(), tuple(options)).request())
        cfg.pop('work_dir')  # else a run that lives there would be in the way
        import_modules_from_strings(**cfg.get('custom_imports', dict(imports=[])))
        imported = time.perf_counter(), time.process_time()
        preflight.check(cfg, loops=('train', 'val'), dry_run=dry_run)
    done = time.perf_counter(), time.process_time()
    imports, checks = ([b - a for a, b in zip(*pair, strict=True)] for pair in ((start, imported), (imported, done)))
    return *imports, *checks


def main() -> None:
    """Measure with and without the trial by turns, and print medians."""
    args = parse_args()
    found = {True: [], False: []}
    for _ in range(args.repeats):
        for dry_run, times in found.items():
            with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
                times.append(pool.submit(measure, args.config, args.cfg_options, args.threads, dry_run).result())
    print(f'{args.config}: seconds, of the processor in brackets; median of {args.repeats}, {args.threads} threads')
    for dry_run, times in found.items():
        imports, imports_cpu, checks, checks_cpu = map(median, zip(*times, strict=True))
        total = median(one[0] + one[2] for one in times)
        print(
            f'{"" if dry_run else "--no-dry-run":12} imports {imports:6.1f} ({imports_cpu:.1f})  '
            f'checks {checks:6.1f} ({checks_cpu:.1f})  both {total:6.1f}'
        )


if __name__ == '__main__':
    main()
