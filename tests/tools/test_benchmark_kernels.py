"""tools/benchmark_kernels.py: what it refuses, and, through Triton's interpreter, what it compares."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from mmdyt.core import kernels


@pytest.mark.parametrize(
    ('args', 'expected'),
    [
        (('--batch', '0'), '--batch must be at least 1, got 0.'),
        (('--batch', '1', '1'), '--batch must hold different values, got [1, 1].'),
        (('--tokens', '1'), '--tokens must be at least 2, got 1.'),
        (('--width', '0'), '--width must be at least 1, got 0.'),
        (('--bottleneck', '-1'), '--bottleneck must be at least 1, got -1.'),
        (('--dtype', 'fp32'), "dtype must be one of ['bf16', 'fp16'], got 'fp32'."),
        (('--json', 'no_such_folder/x.json'), '--json must name a file in an existing folder'),
        ((), 'device must be a GPU, got none: torch finds no CUDA device.'),
    ],
)
def test_refusals(run_tool, capfd, monkeypatch, args, expected):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert refused(run_tool, capfd, *args).startswith(f'error: {expected}')


def test_a_gpu_without_triton_is_refused(run_tool, capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(kernels, 'triton', None)
    assert refused(run_tool, capfd).startswith('error: triton must be installed, got none.')


def refused(run_tool, capfd, *args) -> str:
    with pytest.raises(SystemExit) as exit_info:
        run_tool('benchmark_kernels', *args)
    assert exit_info.value.code == 2
    (message,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith('error: ')]
    return message


SCRIPT = """
import json, sys
from types import SimpleNamespace
import torch
from conftest import load_tool
from mmdyt.core import kernels

tool = load_tool('benchmark_kernels')
args = SimpleNamespace(tokens=9, width=24, bottleneck=5, dtype='fp16')
def time(run):
    run()
    return 2.0
def rows():
    with torch.no_grad():
        return tool.measure(2, args, 'cpu', time)
found = [rows()]
gates, order, add, adapted = kernels.gate_logits, kernels.order_tokens, kernels.add_rows, kernels.adapted
kernels.gate_logits = lambda *a: gates(*a) + 1
kernels.order_tokens = lambda *a: tuple(one.flip(-1) for one in order(*a))
kernels.add_rows = lambda out, rows, update: add(out, rows, 2 * update)
kernels.adapted = lambda *a: adapted(*a[:-1], 0.2)
print(json.dumps([*found, rows()]))
"""


def test_rows_tell_whether_both_agree():
    pytest.importorskip('triton', reason='this torch comes without Triton')
    path = os.pathsep.join([str(ROOT), str(ROOT / 'tests')])
    env = os.environ | dict(TRITON_INTERPRET='1', PYTHONPATH=path, PYTHONWARNINGS='ignore')
    result = subprocess.run([sys.executable, '-c', SCRIPT], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    rows, wrong = json.loads(result.stdout.splitlines()[-1])
    assert [row['kernel'] for row in rows] == ['gate_logits', 'order_tokens', 'add_rows', 'adapted']
    for row in rows:
        assert row['agree'] and row['errors'] and (row['library_us'], row['kernel_us']) == (2.0, 2.0)
        assert (row['batch'], row['tokens']) == (2, 9)
    assert not any(row['agree'] for row in wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_times_of_a_gpu(run_tool, tmp_path, capsys):
    file = tmp_path / 'kernels.json'
    run_tool('benchmark_kernels', '--batch', 1, 2, '--width', 96, '--bottleneck', 8, '--json', file)
    found = json.loads(file.read_text())
    assert [row['batch'] for row in found['rows']] == [1] * 4 + [2] * 4
    assert all(row['agree'] and row['library_us'] > 0 and row['kernel_us'] > 0 for row in found['rows'])
    assert len(capsys.readouterr().out.splitlines()) == 2 + 8
