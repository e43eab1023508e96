"""What the wheel carries, and that it works without a clone: in an environment that the repository is no part of."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from own_worlds import draw_class_folders
from tiny_configs import TINY_ARCH

SOURCES = ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE', 'mmdyt', 'configs', 'tools', 'tests')
LEAF = 'configs/dyt/vitb_cifar100.py'
OWN = """
_base_ = 'mmdyt::own/classification.py'
own = dict(root='data', size=32)
model = dict(backbone=dict(arch=dict(_delete_=True, **{arch}), init_cfg=dict(checkpoint='{pretrained}')))
train_cfg = dict(max_epochs=2)
train_dataloader = dict(batch_size=6, num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
"""


def pip(*words) -> None:
    """Run pip without the network."""
    command = [sys.executable, '-m', 'pip', '--disable-pip-version-check', *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(PIP_NO_INDEX='1'))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources, in which an earlier build and a run left something behind."""
    clone, out = tmp_path_factory.mktemp('clone'), tmp_path_factory.mktemp('wheel')
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, clone / name)
    for name in ('build/lib/mmdyt/gone.py', 'build/lib/mmdyt/.mim/configs/gone.py', 'configs/dyt/notes.txt',
                 'pretrain/vit.pth', 'work_dirs/run/epoch_1.pth', 'configs/work_dirs/run/epoch_1.pth'):  # fmt: skip
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text('')
    pip('wheel', '--no-deps', '--no-build-isolation', '--wheel-dir', out, clone)
    assert not (clone / 'mmdyt/.mim').exists()  # the sources stay as they are
    (path,) = out.glob('mmdyt-*.whl')
    return path


def test_the_wheel_holds_the_package_configs_and_tools_and_nothing_else(wheel):
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'mmdyt').rglob('*.*')
                if path.suffix in ('.py', '.html', '.css', '.js')}  # fmt: skip
    for folder in ('configs', 'tools'):
        found = [path for path in (ROOT / folder).rglob('*') if path.suffix in ('.py', '.sh')]
        expected |= {f'mmdyt/.mim/{path.relative_to(ROOT).as_posix()}' for path in found}
    assert {f'mmdyt/.mim/{LEAF}', 'mmdyt/.mim/tools/dist_train.sh', 'mmdyt/__main__.py'} <= expected
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if '.dist-info/' not in name}
        (script,) = [name for name in archive.namelist() if name.endswith('entry_points.txt')]
        assert 'mmdyt = mmdyt.__main__:main' in archive.read(script).decode()
    assert names == expected


class Installed:
    """An environment with the wheel and the libraries of this one, but not its mmdyt; and a folder to work in."""

    def __init__(self, folder: Path, wheel: Path):
        self.folder, self.bin = folder / 'work', folder / 'env/bin'
        self.folder.mkdir()
        subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder / 'env'], check=True)
        pip('--python', self.bin / 'python', 'install', '--no-deps', wheel)
        (packages,) = (folder / 'env').glob('lib/python*/site-packages')
        # a line of a .pth file is a folder, in which other .pth files, such as an editable install's, do not count
        (packages / 'libraries.pth').write_text(sysconfig.get_paths()['purelib'] + '\n')
        self.package = packages / 'mmdyt'

    def run(self, name: str, *words) -> subprocess.CompletedProcess:
        """A command of the environment."""
        env = {key: value for key, value in os.environ.items() if key not in ('PYTHONPATH', 'MMDYT_DATA')}
        env |= dict(OMP_NUM_THREADS='1', PATH=f'{self.bin}:{env["PATH"]}')
        command = [str(self.bin / name), *map(str, words)]
        result = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
        assert str(ROOT) not in result.stdout + result.stderr
        return result


@pytest.fixture(scope='module')
def installed(tmp_path_factory, wheel, pretrained) -> Installed:
    """With data in class folders and a config of one's own on a packaged one."""
    world = Installed(tmp_path_factory.mktemp('installed'), wheel)
    draw_class_folders(world.folder / 'data')
    shutil.copy(pretrained, world.folder / 'tiny.pth')
    (world.folder / 'own.py').write_text(OWN.format(arch=TINY_ARCH, pretrained='tiny.pth'))
    return world


@pytest.mark.slow
def test_train_test_and_predict_without_a_clone(installed):
    assert str(installed.package) in installed.run('python', '-c', 'import mmdyt; print(mmdyt.__file__)').stdout
    installed.run('mmdyt', 'train', 'own.py', '--method', 'lora+dyt', '--method-options', 'adapter=None')
    work_dir = 'work_dirs/own_lora_dyt'
    tested = installed.run('mmdyt', 'test', f'{work_dir}/own.py', f'{work_dir}/epoch_2.pth')
    assert 'accuracy/top1' in tested.stdout and 'Activation rate' in tested.stdout
    predicted = installed.run('mmdyt', 'predict', f'{work_dir}/epoch_2.pth', 'data/val', '--json').stdout
    assert len([line for line in predicted.splitlines() if line.startswith('{')]) == 6


@pytest.mark.slow
def test_a_packaged_config_is_named_as_in_a_clone(installed):
    counted = installed.run('mmdyt', 'get_flops', LEAF)
    assert 'GMACs' in counted.stdout
    assert f'that of mmdyt is read: {installed.package / ".mim" / LEAF}' in counted.stderr


@pytest.mark.slow
def test_tools_that_start_others_find_them(installed):
    installed.run('mmdyt', 'compare', 'own.py', '--methods', 'linear', 'adapter', '--no-timing')
    table = (installed.folder / 'work_dirs/compare_own/compare.md').read_text()
    assert '| linear |' in table and '| adapter |' in table


@pytest.mark.slow
def test_several_processes(installed):
    installed.run(
        'python', '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
        '-m', 'mmdyt', 'train', 'own.py', '--launcher', 'pytorch', '--work-dir', 'two',
    )  # fmt: skip
    assert (installed.folder / 'two/epoch_2.pth').exists()
