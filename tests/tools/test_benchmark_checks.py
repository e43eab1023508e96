"""tools/benchmark_checks.py, in a process of its own: it starts others, which import it by its name."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT


def run(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / 'tools/benchmark_checks.py', *map(str, args)]
    return subprocess.run(command, env=os.environ | dict(PYTHONPATH=str(ROOT)), capture_output=True, text=True)


def test_imports_and_checks_are_timed_with_and_without_the_trial(tiny_cls_config):
    result = run(tiny_cls_config, '--repeats', 1)
    assert result.returncode == 0, result.stderr[-2000:]
    number = r'\s*(\d+\.\d)'
    form = rf'imports{number} \({number}\)  checks{number} \({number}\)  both{number}'
    trial, without = result.stdout.splitlines()[-2:]
    assert without.startswith('--no-dry-run ') and not trial.startswith('--no-dry-run')
    for line in (trial, without):
        imports, _, checks, _, both = map(float, re.search(form, line).groups())
        assert imports > 0 and both == pytest.approx(imports + checks, abs=0.2)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--repeats', 0], '--repeats must be at least 1, got 0.'),
        (['--threads', 0], '--threads must be at least 1, got 0.'),
        (['--repeats', 1, '--cfg-options', 'model.head.num_classes=1'], 'lies outside [0, 1)'),
    ],
)
def test_refused_in_one_line(tiny_cls_config, options, message):
    result = run(tiny_cls_config, *options)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if 'error: ' in line]
    assert message in line and 'Traceback' not in result.stderr
