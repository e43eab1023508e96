"""Memory and time of several tasks on one base, beside as many separate models.

python tools/benchmark_tasks.py FILE.safetensors FILE.safetensors ... [--batch-size N] [--repeats N] [--device cuda]
"""

import argparse
import sys
import time
from contextlib import redirect_stdout
from statistics import median

from mmdyt import compat

compat.install()

import numpy as np
import torch

from mmdyt import preflight
from mmdyt.apis import Predictor, Tasks, load, load_tasks

MEGA = 1e6


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('files', nargs='+', help='tuned-only files of one base')
    parser.add_argument('--batch-size', type=int, default=8, help='inputs of each task in the mixed batch; default: 8')
    parser.add_argument('--repeats', type=int, default=5, help='of which the median is told; default: 5')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    return parser.parse_args()


def megabytes(tensors) -> float:
    """Of tensors, each storage once."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values()) / MEGA


def timed(run, device: str) -> float:
    """Milliseconds of a call."""
    start = time.perf_counter()
    run()
    if device.startswith('cuda'):
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def noise(model: Predictor, number: int) -> list[np.ndarray]:
    """Images or clips in 8 bits."""
    size = model.host.backbone.img_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    shape = (64, *size, 3) if model.video else (*size, 3)
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, shape, np.uint8) for _ in range(number)]


def measure(tasks: Tasks, models: list[Predictor], args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a mixed batch, in turns, and how far its scores are from those of the separate models."""
    names = tasks.names
    inputs = {name: noise(tasks[name], args.batch_size) for name in names}
    mixed = [inputs[name][i] for i in range(args.batch_size) for name in names]
    order = [name for _ in range(args.batch_size) for name in names]

    def together() -> list:
        return tasks(mixed, order, batch_size=args.batch_size)

    def apart() -> list:
        return [model(inputs[name], args.batch_size) for name, model in zip(names, models, strict=True)]

    first, second = together(), apart()  # warm, and compared
    worst = 0.0
    for place, alone in enumerate(second):
        for one, other in zip(first[place :: len(names)], alone, strict=True):
            scores = [{s.label: s.score for s in found.top} for found in (one, other)]
            worst = max([worst, *(abs(scores[0].get(label, 1.0) - scores[1][label]) for label in scores[1])])
    times = [(timed(together, args.device), timed(apart, args.device)) for _ in range(args.repeats)]
    return dict(together=median(t for t, _ in times), apart=median(t for _, t in times), worst=worst)


def main() -> None:
    """Load both, measure, print."""
    args = parse_args()
    with preflight.clean_exit():
        for name in ('batch_size', 'repeats'):
            if getattr(args, name) < 1:
                raise ValueError(f'--{name.replace("_", "-")} must be at least 1, got {getattr(args, name)}.')
        with redirect_stdout(sys.stderr):  # logs of the hosts
            tasks = load_tasks({f'{i}': file for i, file in enumerate(args.files)}, device=args.device)
            models = [load(file, device=args.device) for file in args.files]
        found = measure(tasks, models, args)
    apart = megabytes(t for model in models for t in (*model.host.parameters(), *model.host.buffers()))
    total = args.batch_size * len(args.files)
    print(f'{len(args.files)} tasks, a mixed batch of {total}, {args.device}.')
    print(f'{"":<18}{"weights, MB":>12}{"ms":>10}')
    print(f'{"one base":<18}{megabytes(tasks.tensors()):>12.2f}{found["together"]:>10.1f}')
    print(f'{"separate models":<18}{apart:>12.2f}{found["apart"]:>10.1f}')
    print(f'Scores differ by at most {found["worst"]:.1e}.')


if __name__ == '__main__':
    main()
