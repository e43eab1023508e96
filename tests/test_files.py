"""Every writer leaves a whole file or the old one, and names the file; a folder is held by one process."""

import errno
import os
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import cv2
import mmcv
import mmengine
import numpy as np
import pytest
import torch
from conftest import load_tool
from dispatch_samples import segmented
from mmengine.config import Config
from mmengine.runner import save_checkpoint
from mmengine.visualization import LocalVisBackend

from mmdyt import compat, files
from mmdyt.engine.comparison_plot import plot
from mmdyt.engine.pictures import write_picture
from mmdyt.engine.visualize.charts import layer_rates, write_figure
from mmdyt.engine.visualize.page import write_page
from mmdyt.files import check_out_file, hold, whole_file, whole_path, write_json, write_text
from mmdyt.tuned.file import write as write_tuned

compat.install()
NOISE = np.random.default_rng(0).integers(0, 255, (200, 200, 3)).astype(np.uint8)
TENSORS = dict(state_dict=dict(a=torch.zeros(20000)))
ROW = dict(method='a', mean=70.0, low=69.0, high=73.0, gmacs=1.0, tuned=1.0)


def calibrated(path: Path) -> None:
    tool, good = load_tool('calibrate'), path.with_name('given.pth')
    torch.save(TENSORS, good)
    with full_disk():
        tool.write(torch.nn.Linear(1, 1), str(good), path)


def visualized(path: Path) -> None:
    backend = LocalVisBackend(str(path.parent), img_save_dir='.')
    os.replace(path, path.with_name('x_0.png'))
    try:
        with full_disk():
            backend.add_image('x', NOISE)
    finally:
        os.replace(path.with_name('x_0.png'), path)


# how each kind of file is written: by us, and by the hosts
WRITERS = {
    'text.txt': lambda path: write_text(path, 'x' * 20000),
    'numbers.json': lambda path: write_json(path, list(range(5000))),
    'compare.png': lambda path: plot([ROW], 'mIoU', path),
    'rates.png': lambda path: write_figure(layer_rates([segmented('a')]), path),
    'page.html': lambda path: write_page([segmented('a')], path, 'Title'),
    'demo.png': lambda path: write_picture(path, NOISE),
    'calibrated.pth': calibrated,
    'converted.pth': lambda path: load_tool('convert_vit').write(TENSORS, path),
    'tuned.safetensors': lambda path: write_tuned(TENSORS, path),
    'shape.png': lambda path: load_tool('demo_data').write_png(path, NOISE),
    'epoch_1.pth': lambda path: save_checkpoint(TENSORS, str(path)),
    'predictions.pkl': lambda path: mmengine.dump(list(range(20000)), str(path)),
    'metrics.json': lambda path: mmengine.dump(list(range(5000)), str(path)),
    'painted.png': lambda path: mmcv.imwrite(NOISE, str(path)),
    'x.png': visualized,
    'config.py': lambda path: Config(dict(a=list(range(5000)))).dump(str(path)),
}


@contextmanager
def full_disk(size: int = 10000):
    """No file can grow beyond ``size`` bytes: the system refuses, as it does on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize('name', WRITERS)
def test_a_full_disk_leaves_the_old_file_and_is_named(name, tmp_path):
    folder = tmp_path / 'out'
    folder.mkdir()
    file, write = folder / name, WRITERS[name]
    file.write_text('good')
    with pytest.raises(OSError, match=r'file must be writable, got .*\.\w+: File too large\.') as raised:
        if write in (calibrated, visualized):  # which read, or make something, before they write
            write(file)
        else:
            with full_disk():
                write(file)
    assert raised.value.errno == errno.EFBIG
    assert file.read_text() == 'good' and {path.name for path in folder.iterdir()} <= {name, 'given.pth'}


@pytest.mark.parametrize('name', sorted(set(WRITERS) - {'calibrated.pth', 'x.png'}))
def test_what_is_written_is_whole(name, tmp_path):
    file = tmp_path / name
    file.write_text('old')
    WRITERS[name](file)
    assert file.stat().st_size > 1000 and list(tmp_path.iterdir()) == [file]
    if file.suffix == '.png':
        assert cv2.imread(str(file)) is not None
    if file.suffix == '.pth':
        assert torch.equal(torch.load(file)['state_dict']['a'], TENSORS['state_dict']['a'])


@pytest.mark.parametrize(
    ('target', 'error', 'reason'),
    [
        ('folder', IsADirectoryError, 'it is a folder'),
        ('none/x.txt', FileNotFoundError, 'its folder is missing'),
        ('protected.txt', PermissionError, 'no permission'),
    ],
)
def test_what_cannot_be_written_is_named_and_refused_before(target, error, reason, tmp_path, monkeypatch):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'protected.txt').write_text('good')
    access = os.access
    monkeypatch.setattr(os, 'access', lambda path, mode: 'protected' not in str(path) and access(path, mode))
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(error, match=f'file must be writable, got .*{target}: {reason}.'):
        write_text(tmp_path / target, 'x')
    with pytest.raises(ValueError, match=f'--json must name a file .*, got .*{target}'):
        check_out_file('--json', tmp_path / target)
    assert sorted(tmp_path.rglob('*')) == before and (tmp_path / 'protected.txt').read_text() == 'good'


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    file = tmp_path / 'x.txt'
    file.write_text('good')
    if (child := os.fork()) == 0:
        with whole_file(file) as stream:
            stream.write('half')
            stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert file.read_text() == 'good'


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    file = tmp_path / 'compare.png'
    with whole_path(file) as one, whole_path(file) as other:
        assert len({file, one, other}) == 3
        one.write_text('one')
        other.write_text('other')
    assert file.read_text() == 'one' and list(tmp_path.iterdir()) == [file]


def test_errors_of_other_files_stay_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match='other.txt'), whole_path(tmp_path / 'x.txt'):
        (tmp_path / 'other.txt').read_text()


def test_links_modes_and_devices_stay(tmp_path):
    file, link = tmp_path / 'file.txt', tmp_path / 'link.txt'
    file.write_text('old')
    file.chmod(0o640)
    link.symlink_to(file)
    write_text(link, 'new')
    assert link.is_symlink() and file.read_text() == 'new' and file.stat().st_mode & 0o777 == 0o640
    write_text('/dev/null', 'x')
    assert Path('/dev/null').is_char_device()


def hold_in_child(folder: Path, then) -> int:
    """A process that holds a folder; returns its id once it does."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        held = hold(folder)
        os.write(writer, b'x')
        then(held)
        os._exit(0)
    assert os.read(reader, 1) == b'x'
    return child


def test_a_folder_is_held_until_its_process_ends_even_if_workers_outlive_it(tmp_path):
    folder, (reader, writer) = tmp_path / 'run', os.pipe()

    def work(held) -> None:
        if (worker := os.fork()) == 0:
            os.read(reader, 1)
            os._exit(0)
        os.waitpid(worker, 0)

    child = hold_in_child(folder, work)
    with pytest.raises(BlockingIOError, match=f'run is in use by process {child} on '):
        hold(folder)
    with hold(tmp_path / 'other'), hold(folder, '.another'):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with hold(folder):
        assert f'process {os.getpid()} on ' in (folder / files.LOCK).read_text()
    os.write(writer, b'x')


@pytest.mark.parametrize('error', [OSError(errno.ENOLCK, 'No locks available'), OSError(errno.EROFS, 'Read-only')])
def test_where_there_are_no_locks_a_line_says_so(error, tmp_path, monkeypatch, capsys):
    def lockf(*args):
        raise error

    monkeypatch.setattr(files.fcntl, 'lockf', lockf)
    with hold(tmp_path):
        assert f'warning: {tmp_path} cannot be locked' in capsys.readouterr().err
