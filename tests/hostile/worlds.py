"""The worlds that the cases are played in."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from tiny_configs import TINY_ARCH, TINY_VTAB_CONFIG, draw_vtab_task

FOLDERS = """
_base_ = ['./lists.py']
folder = dict(ann_file='')
train_dataloader = dict(dataset=dict(data_prefix='train', **folder))
val_dataloader = dict(dataset=dict(data_prefix='val', **folder))
test_dataloader = val_dataloader
"""


def _adopt(master: Path, name: str, config: Path, pretrained: Path, data: Path) -> Path:
    """A world of a config and its data: all in one folder, with a short schedule."""
    here = master / name
    shutil.copytree(data, here, ignore=shutil.ignore_patterns('config.py'))
    text = config.read_text().replace(str(data), str(here)).replace(str(pretrained), str(master / 'pretrained.pth'))
    text = text.replace('max_epochs=8, val_interval=8', 'max_epochs=2, val_interval=2')
    (here / 'config.py').write_text(text.replace('checkpoint=dict(interval=8)', 'checkpoint=dict(interval=1)'))
    return here


def _class_folders(master: Path) -> None:
    """The images of the lists, each in the folder of its class."""
    here, lists = master / 'folders', master / 'cls'
    here.mkdir()
    for split, name in (('train', 'train.txt'), ('val', 'test.txt')):
        for line in (lists / name).read_text().split('\n'):
            if line:
                image, label = line.split()
                target = here / split / ('blue', 'green', 'red')[int(label)] / image
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(lists / image, target)
    (here / 'lists.py').write_text((lists / 'config.py').read_text().replace(str(lists), str(here)))
    (here / 'config.py').write_text(FOLDERS)


def _vtab(master: Path) -> None:
    """Two tasks of 6 training and 4 test images."""
    here = master / 'vtab'
    for task, classes in (('cifar', 100), ('svhn', 10)):
        draw_vtab_task(here / 'root' / task, classes)
    text = TINY_VTAB_CONFIG.format(root=ROOT, arch=dict(TINY_ARCH), pretrained=master / 'pretrained.pth')
    (here / 'config.py').write_text(text)


@pytest.fixture(scope='session')
def master(tmp_path_factory, ade_root, pretrained, tiny_config, tiny_cls_config, tiny_video_config, run_tool) -> Path:
    """All worlds, each with the work dir of a finished training, before anything is spoiled."""
    folder = tmp_path_factory.mktemp('hostile')
    shutil.copy(pretrained, folder / 'pretrained.pth')
    _adopt(folder, 'seg', tiny_config, pretrained, ade_root)
    _adopt(folder, 'cls', tiny_cls_config, pretrained, tiny_cls_config.parent)
    _adopt(folder, 'video', tiny_video_config, pretrained, tiny_video_config.parent)
    _class_folders(folder)
    _vtab(folder)
    for name in ('seg', 'cls', 'video', 'folders'):
        run = folder / name / 'run'
        run_tool('train', folder / name / 'config.py', '--work-dir', run)
        last = Path((run / 'last_checkpoint').read_text())
        shutil.copy(run / last.name, run / 'last.pth')
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    return folder
