"""The kernels of a GPU give what the plain path gives: through Triton's interpreter on a CPU, and on a GPU.

The interpreter is chosen before triton is imported, so all cases run in a process of their own: this file as a script.
"""

import json
import os
import subprocess
import sys
import traceback
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmdyt.core import kernels
from mmdyt.core.dispatch import BestTokens, best_tokens

ROOT = Path(__file__).parents[2]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {FP32: 1e-5, BF16: 2e-2, FP16: 2e-3}  # relative, and of values near 1


def gates(device, images, patches, prefix, width, dtype):
    x = torch.randn(images, prefix + patches, width, device=device).to(dtype)[:, prefix:]
    weight, bias = torch.randn(1, width, device=device), torch.randn(1, device=device)
    assert_close(kernels.gate_logits(x, weight, bias), F.linear(x.float(), weight, bias), rtol=1e-5, atol=1e-4)


def orders(device, images, patches, prefix, capacity, logits):
    logits = logits(torch.randn(images, patches, 1, device=device))
    with torch.enable_grad():  # the plain path, on a GPU too
        expected = best_tokens(logits, capacity, prefix)
    order, rows = kernels.order_tokens(logits, expected.active, prefix)
    assert torch.equal(order, expected.order) and torch.equal(rows, expected.rows())


def additions(device, active, width, dtype, more, dense):
    out, rows = torch.randn(40, width, device=device).to(dtype), torch.randperm(40, device=device)[:active]
    update = torch.randn(active, width, device=device).to(more)
    update = update if dense else update.T.contiguous().T
    expected = out.clone().index_add_(0, rows, update.to(dtype))
    found = kernels.add_rows(out, rows, update)
    assert found is out
    assert_close(found, expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


def updates(device, images, tokens, width, bottleneck, dtype, spoilt, same=False):
    x = spoilt(torch.randn(images, tokens, width, device=device)).to(dtype)
    out = x if same else torch.randn(images, tokens, width, device=device).to(dtype)
    down = torch.randn(bottleneck, width, device=device).div(width**0.5).to(dtype), torch.randn(bottleneck).to(x)
    up = torch.randn(width, bottleneck, device=device).div(bottleneck**0.5).to(dtype), torch.randn(width).to(x)
    before = out.clone()
    found = kernels.adapted(out, x, down, up, 0.7)
    hidden = F.relu(F.linear(x.double(), *(one.double() for one in down)))
    expected = out.double() + 0.7 * F.linear(hidden, *(one.double() for one in up))
    assert found.dtype == dtype and torch.equal(out.nan_to_num(), before.nan_to_num())
    assert_close(found.double(), expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype], equal_nan=True)


def plain(x):
    return x


def ties(logits):
    return logits.round()


def equal(logits):
    return logits.zero_()


def broken(logits):
    logits[0, :3, 0] = torch.tensor([-torch.inf, torch.nan, torch.inf])[: logits.shape[1]]
    logits[-1, -1] = torch.nan
    return logits


def all_broken(logits):
    return logits.fill_(torch.nan)


def nan_tokens(x):
    x[0, 0, 0] = torch.nan
    x[-1, -1] = torch.nan
    return x


def infinite_tokens(x):
    x[0, 0, 0], x[-1, -1, -1] = torch.inf, -torch.inf
    return x


def cases() -> dict:
    """Name to a function of the device."""
    found = {}
    for images, patches, prefix, width in [(3, 20, 1, 48), (1, 300, 0, 33), (2, 7, 2, 300), (2, 1, 1, 1), (2, 0, 1, 8)]:
        for dtype in (FP32, BF16, FP16):
            found[f'gates {images} {patches} {prefix} {width} {dtype}'] = partial(
                gates, images=images, patches=patches, prefix=prefix, width=width, dtype=dtype
            )
    for images, patches, prefix in [(3, 20, 1), (1, 300, 0), (2, 9, 3), (2, 1, 0), (2, 0, 1)]:
        for capacity in (0, 0.3, 1):
            for logits in (plain, ties, equal, broken, all_broken) if patches else (plain,):
                found[f'orders {images} {patches} {prefix} {capacity} {logits.__name__}'] = partial(
                    orders, images=images, patches=patches, prefix=prefix, capacity=capacity, logits=logits
                )
    for active, width, dense in [(20, 48, True), (1, 1, True), (40, 33, True), (7, 12, False), (0, 8, True)]:
        for dtype, more in [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, BF16)]:
            found[f'additions {active} {width} {"dense" if dense else "strided"} {dtype} {more}'] = partial(
                additions, active=active, width=width, dtype=dtype, more=more, dense=dense
            )
    for images, tokens, width, bottleneck in [(3, 21, 48, 8), (1, 65, 64, 64), (2, 5, 33, 12), (1, 1, 130, 20)]:
        for dtype in kernels.HALVES:
            for spoilt in (plain, nan_tokens, infinite_tokens):
                found[f'updates {images} {tokens} {width} {bottleneck} {dtype} {spoilt.__name__}'] = partial(
                    updates,
                    images=images,
                    tokens=tokens,
                    width=width,
                    bottleneck=bottleneck,
                    dtype=dtype,
                    spoilt=spoilt,
                )
    found['updates of themselves'] = partial(
        updates, images=2, tokens=9, width=48, bottleneck=8, dtype=FP16, spoilt=plain, same=True
    )
    return found


CASES = cases()
# the interpreter multiplies matrices of bf16 as the integers that hold them
INTERPRETED = [name for name, case in CASES.items() if case.func is not updates or case.keywords['dtype'] != BF16]


def failures() -> dict[str, str]:
    """What went wrong through the interpreter, by the name of the case."""
    found = {}
    for name in INTERPRETED:
        torch.manual_seed(0)
        try:
            CASES[name]('cpu')
        except Exception:  # one case must not hide the others
            found[name] = traceback.format_exc()
    return found


@pytest.fixture(scope='module')
def interpreted() -> dict[str, str]:
    pytest.importorskip('triton', reason='this torch comes without Triton')
    env = os.environ | dict(TRITON_INTERPRET='1', PYTHONPATH=str(ROOT), PYTHONWARNINGS='ignore')
    result = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize('name', INTERPRETED)
def test_kernels_give_what_the_plain_path_gives(interpreted, name):
    assert name not in interpreted, interpreted[name]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('name', CASES)
def test_kernels_give_what_the_plain_path_gives_on_a_gpu(name):
    torch.manual_seed(0)
    with torch.no_grad():
        CASES[name]('cuda')


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_a_gpu_uses_them_for_inference_in_what_they_compute():
    pytest.importorskip('triton', reason='this torch comes without Triton')
    x = torch.zeros(1, device='cuda')
    assert not kernels.usable(x)
    with torch.no_grad():
        assert kernels.usable(x) and kernels.usable(x.bfloat16()) and not kernels.usable(x.double())


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Makes tokens that say to be on the first of two GPUs, on which the kernels run."""
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(kernels, '_works', lambda device: True)
    return partial(SimpleNamespace, is_cuda=True, dtype=FP32, device=torch.device('cuda', 0))


def test_usable_where_nothing_speaks_against_them(on_a_gpu):
    with torch.no_grad():
        assert all(kernels.usable(on_a_gpu(dtype=dtype)) for dtype in (FP32, BF16, FP16))
    with torch.inference_mode():
        assert kernels.usable(on_a_gpu())


@pytest.mark.parametrize(
    'tokens', [dict(is_cuda=False), dict(dtype=torch.float64), dict(device=torch.device('cuda', 1))], ids=str
)
def test_not_usable_for_other_tokens(on_a_gpu, tokens):
    with torch.no_grad():
        assert not kernels.usable(on_a_gpu(**tokens))


@pytest.mark.parametrize('asked', ['torch.compiler.is_compiling', 'torch.jit.is_tracing'])
def test_not_usable_in_what_is_compiled_or_traced(on_a_gpu, monkeypatch, asked):
    monkeypatch.setattr(asked, lambda: True)
    with torch.no_grad():
        assert not kernels.usable(on_a_gpu())


def test_not_usable_with_gradients(on_a_gpu):
    assert torch.is_grad_enabled() and not kernels.usable(on_a_gpu())


def test_not_usable_on_a_cpu():
    with torch.no_grad():
        assert not kernels.usable(torch.zeros(1))


def works(out, rows, update):
    return out.index_add_(0, rows, update)


def fails(out, rows, update):
    raise RuntimeError('no C compiler\nand more')


@pytest.fixture
def triton_that(monkeypatch):
    """Installs what a kernel does; asks whether kernels work, of a device that was not asked about."""
    kernels._works.cache_clear()
    monkeypatch.delenv(kernels.SWITCH, raising=False)

    def install(kernel):
        monkeypatch.setattr(kernels, 'triton', object())
        monkeypatch.setattr(kernels, 'add_rows', kernel)
        return partial(kernels._works, torch.device('cpu'))

    yield install
    kernels._works.cache_clear()


def test_kernels_that_work_are_used(triton_that):
    assert triton_that(works)()


@pytest.mark.parametrize(
    ('kernel', 'reason'),
    [(fails, 'RuntimeError: no C compiler'), (lambda out, rows, update: out, 'a wrong result')],
    ids=['an error', 'a wrong result'],
)
def test_a_triton_that_fails_warns_once_and_is_not_used(triton_that, kernel, reason):
    ask = triton_that(kernel)
    with pytest.warns(UserWarning) as caught:
        assert not ask() and not ask()
    (warning,) = caught
    assert str(warning.message) == f'Triton does not run on cpu ({reason}): slower operators are used.'


def test_the_environment_takes_the_plain_path_without_a_word(triton_that, monkeypatch):
    monkeypatch.setenv('MMDYT_KERNELS', 'library')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert not triton_that(works)()


def test_without_triton_the_plain_path_is_taken_without_a_word(triton_that, monkeypatch):
    ask = triton_that(works)
    monkeypatch.setattr(kernels, 'triton', None)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert not ask()


def test_best_tokens_with_rows_are_those_without():
    logits, order = torch.randn(3, 8, 1), torch.stack([torch.randperm(9) for _ in range(3)])
    without = BestTokens(order, 4, logits, 1)
    rows = without.rows()
    given = BestTokens(order, 4, logits, 1, rows)
    assert given.rows() is rows
    assert torch.equal(given.mask, without.mask) and torch.equal(given.inactive_rows(), without.inactive_rows())
    assert torch.equal(given.mask.flatten().nonzero().squeeze(1), rows.sort().values)


if __name__ == '__main__':
    json.dump(failures(), sys.stdout)
