"""Time the kernels of a GPU beside the library operators that they replace, and check that both agree.

python tools/benchmark_kernels.py --batch 1 32 128 --json kernels.json
python tools/benchmark_kernels.py --batch 8 --tokens 1025
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmdyt import compat

compat.install()

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdyt import preflight
from mmdyt.core import kernels
from mmdyt.core.dispatch import BestTokens, best_tokens
from mmdyt.core.options import check_choice
from mmdyt.files import check_out_file, write_json

DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16)  # the adapter's kernel is for halves
CAPACITY, PREFIX, SCALE = 0.5, 1, 0.1
WARM_UP_MS, TIMED_MS = 5, 20

Timer = Callable[[Callable[[], object]], float]


@dataclass
class Pair:
    """One kernel and what it replaces.

    Attributes:
        library: Runs the operators of the library.
        kernel: Runs the kernel.
        errors: How far apart they are, or how far from fp64, by name; in the units of the result.
        agree: Whether that is rounding.
    """

    library: Callable[[], object]
    kernel: Callable[[], object]
    errors: dict[str, float]
    agree: bool


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Time each kernel that inference runs on a GPU beside the library operators that it replaces: '
        'medians in microseconds. Both must agree.'
    )
    parser.add_argument('--batch', type=int, nargs='+', default=[1, 32, 128], help='images')
    parser.add_argument('--tokens', type=int, default=197, help='of an image, with one prefix token')
    parser.add_argument('--width', type=int, default=768, help='of a token')
    parser.add_argument('--bottleneck', type=int, default=64, help='of the adapter')
    parser.add_argument('--dtype', default='bf16', help=f'of the tokens: {", ".join(DTYPES)}')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the times, in microseconds')
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Refuse options out of range, and a machine that runs no kernels.

    Raises:
        ValueError: With the option.
    """
    if len(set(args.batch)) < len(args.batch):
        raise ValueError(f'--batch must hold different values, got {args.batch}.')
    least = dict(batch=1, tokens=1 + PREFIX, width=1, bottleneck=1)
    for name, number in least.items():
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value < number:
                raise ValueError(f'--{name} must be at least {number}, got {value}.')
    check_choice(tuple(DTYPES), dtype=args.dtype)
    if args.json:
        check_out_file('--json', args.json)
    if not torch.cuda.is_available():
        raise ValueError('device must be a GPU, got none: torch finds no CUDA device.')
    if kernels.triton is None:
        raise ValueError('triton must be installed, got none. Builds of torch for CUDA bring it along on Linux.')


def pairs(batch: int, args: argparse.Namespace, device: str) -> dict[str, Pair]:
    """Each kernel beside its operators, on random tokens of one batch size, by its name."""
    torch.manual_seed(0)
    shape, dtype = (batch, args.tokens, args.width), DTYPES[args.dtype]
    x = torch.randn(shape, device=device).to(dtype)
    found = dict(gate_logits=_gate_logits(x))
    logits = found['gate_logits'].library()
    found['order_tokens'] = _order_tokens(logits)
    found['add_rows'] = _add_rows(x, _plain_order(logits).rows())
    found['adapted'] = _adapted(x, args.bottleneck)
    return found


def _gate_logits(x: Tensor) -> Pair:
    weight, bias = 0.02 * torch.randn(1, x.shape[2], device=x.device), torch.zeros(1, device=x.device)

    def library() -> Tensor:
        return F.linear(x[:, PREFIX:].float(), weight, bias)

    def kernel() -> Tensor:
        return kernels.gate_logits(x[:, PREFIX:], weight, bias)

    difference = (kernel() - library()).abs().max().item()
    return Pair(library, kernel, dict(difference=difference), difference < 1e-4)


def _plain_order(logits: Tensor) -> BestTokens:
    """By the library: with gradients the kernels are not used."""
    with torch.enable_grad():
        dispatch = best_tokens(logits, CAPACITY, PREFIX)
    dispatch.rows()
    return dispatch


def _order_tokens(logits: Tensor) -> Pair:
    expected = _plain_order(logits)

    def kernel() -> tuple[Tensor, Tensor]:
        return kernels.order_tokens(logits, expected.active, PREFIX)

    order, rows = kernel()
    places = int((order != expected.order).sum() + (rows != expected.rows()).sum())
    return Pair(lambda: _plain_order(logits), kernel, dict(places=places), places == 0)


def _add_rows(x: Tensor, rows: Tensor) -> Pair:
    out, update = x.flatten(0, 1).clone(), torch.randn(len(rows), x.shape[2], device=x.device).to(x.dtype)
    found, expected = kernels.add_rows(out.clone(), rows, update), out.clone().index_add_(0, rows, update)
    difference = (found.float() - expected.float()).abs().max().item()
    # the library may round on the way, in the last digit of values below 16
    return Pair(
        lambda: out.index_add_(0, rows, update),
        lambda: kernels.add_rows(out, rows, update),
        dict(difference=difference),
        difference <= 16 * torch.finfo(x.dtype).eps,
    )


def _adapted(x: Tensor, bottleneck: int) -> Pair:
    """Errors of both are relative to fp64, norm by norm."""
    width, like = x.shape[2], dict(device=x.device)
    down = (0.03 * torch.randn(bottleneck, width, **like)).to(x), (0.1 * torch.randn(bottleneck, **like)).to(x)
    up = (0.1 * torch.randn(width, bottleneck, **like)).to(x), (0.1 * torch.randn(width, **like)).to(x)

    def library() -> Tensor:
        return x + SCALE * F.linear(F.relu(F.linear(x, *down)), *up)

    def kernel() -> Tensor:
        return kernels.adapted(x, x, down, up, SCALE)

    hidden = F.relu(F.linear(x.double(), *(one.double() for one in down)))
    exact = x.double() + SCALE * F.linear(hidden, *(one.double() for one in up))
    errors = {
        name: ((run().double() - exact).norm() / exact.norm()).item()
        for name, run in dict(library=library, kernel=kernel).items()
    }
    return Pair(library, kernel, errors, errors['kernel'] < 1.5 * errors['library'] + 1e-6)


def measure(batch: int, args: argparse.Namespace, device: str, timer: Timer) -> list[dict]:
    """A row for each kernel: times in microseconds, and how far both are apart."""
    return [
        dict(
            batch=batch,
            tokens=args.tokens,
            kernel=name,
            library_us=round(timer(pair.library), 3),
            kernel_us=round(timer(pair.kernel), 3),
            agree=pair.agree,
            errors={word: round(error, 6) for word, error in pair.errors.items()},
        )
        for name, pair in pairs(batch, args, device).items()
    ]


def do_bench(run: Callable[[], object]) -> float:
    """Median microseconds of one call on the GPU, its cache cleared before each."""
    from triton.testing import do_bench as bench

    return 1e3 * bench(run, warmup=WARM_UP_MS, rep=TIMED_MS, return_mode='median')


@torch.no_grad()
def main() -> None:
    """Check everything, then time."""
    args = parse_args()
    with preflight.clean_exit():
        check_args(args)
    print(f'Microseconds, medians; {torch.cuda.get_device_name()}, {args.dtype}, {args.tokens} x {args.width}')
    print(f'{"batch":>5}  {"kernel":<14}{"library":>10}{"kernel":>10}{"ratio":>8}')
    rows = []
    for batch in args.batch:
        for row in measure(batch, args, 'cuda', do_bench):
            rows.append(row)
            ratio, word = row['kernel_us'] / row['library_us'], '' if row['agree'] else f'  differs: {row["errors"]}'
            times = f'{row["library_us"]:>10.1f}{row["kernel_us"]:>10.1f}{ratio:>8.2f}'
            print(f'{batch:>5}  {row["kernel"]:<14}{times}{word}')
    if args.json:
        about = dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__, triton=kernels.triton.__version__)
        setting = dict(dtype=args.dtype, width=args.width, bottleneck=args.bottleneck, capacity=CAPACITY)
        with preflight.clean_exit():
            write_json(args.json, dict(about, **setting, rows=rows))
    if different := [f'{row["kernel"]} at batch {row["batch"]}' for row in rows if not row['agree']]:
        raise SystemExit(f'error: kernels must agree with the library, got others: {", ".join(different)}.')


if __name__ == '__main__':
    main()
