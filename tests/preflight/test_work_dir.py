"""A work dir is a folder, and one run's at a time."""

import os
import subprocess
import sys

import pytest
from mmengine.config import Config

from mmdyt import preflight
from mmdyt.preflight.work_dir import check_folder

HOLD = """
import sys
from pathlib import Path
from mmdyt.files import hold
with hold(Path(sys.argv[1])):
    print('held', flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def busy(tmp_path):
    """A work dir that another process holds."""
    process = subprocess.Popen(
        [sys.executable, '-c', HOLD, str(tmp_path / 'run')], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == 'held\n'
    yield tmp_path / 'run'
    process.communicate()


def config(work_dir, launcher='none') -> Config:
    return Config(dict(work_dir=str(work_dir), launcher=launcher))


def test_a_second_run_is_refused(busy, run_tool, tiny_config, capsys):
    with pytest.raises(ValueError, match='--work-dir must be that of no other run .*is in use by process .* on '):
        preflight.hold_work_dir(config(busy))
    before = {path: path.stat().st_mtime_ns for path in busy.rglob('*')}
    with pytest.raises(SystemExit):
        run_tool('train', tiny_config, '--work-dir', busy)
    assert 'error: --work-dir must be that of no other run that is going on, got ' in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in busy.rglob('*')} == before


@pytest.mark.parametrize(
    ('launcher', 'rank'), [('pytorch', 'RANK'), ('slurm', 'SLURM_PROCID'), ('mpi', 'OMPI_COMM_WORLD_RANK')]
)
def test_the_processes_of_a_run_share_its_work_dir(launcher, rank, busy, monkeypatch):
    monkeypatch.setenv(rank, '1')
    with preflight.hold_work_dir(config(busy, launcher)):
        pass
    monkeypatch.setenv(rank, '0')
    with pytest.raises(ValueError, match='no other run'):
        preflight.hold_work_dir(config(busy, launcher))


def test_the_next_run_may_begin_when_the_first_has_ended(tmp_path):
    for _ in range(2):
        with preflight.hold_work_dir(config(tmp_path)):
            pass


@pytest.mark.parametrize('place', ['file', 'file/below', 'protected/new'])
def test_a_work_dir_that_is_none_is_refused(place, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'protected').mkdir()
    monkeypatch.setattr(os, 'access', lambda path, mode: 'protected' not in str(path))
    with pytest.raises(ValueError, match=f'--show-dir must be a folder.*, got .*{place}: '):
        check_folder('--show-dir', str(tmp_path / place))
    check_folder('--work-dir', str(tmp_path / 'new' / 'newer'))
    assert not (tmp_path / 'new').exists()
