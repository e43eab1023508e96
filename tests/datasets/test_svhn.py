"""mmdyt.SVHN: the digits of a .mat file as mmpretrain's data sets hold theirs."""

import re

import numpy as np
import pytest
import scipy.io
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, DefaultScope
from torchvision.datasets import SVHN as TorchvisionSVHN

from mmdyt import compat

compat.install()

from mmdyt.datasets import svhn  # noqa: E402
from mmdyt.preflight.datasets import check_data  # noqa: E402

LABELS = [1, 10, 9, 5]  # the file calls the digit 0 "10"


@pytest.fixture
def images() -> np.ndarray:
    """Four images, RGB: the first is red."""
    images = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3)).astype(np.uint8)
    images[0] = 255, 0, 0
    return images


@pytest.fixture
def root(tmp_path, images, monkeypatch):
    """A folder with a tiny training file, which counts as the published one."""
    content = dict(X=images.transpose(1, 2, 3, 0), y=np.array(LABELS, dtype=np.uint8)[:, None])
    scipy.io.savemat(tmp_path / 'train_32x32.mat', content)
    url, name, _ = TorchvisionSVHN.split_list['train']
    monkeypatch.setitem(TorchvisionSVHN.split_list, 'train', [url, name, None])
    return tmp_path


def build(**options):
    """The data set as a config of mmpretrain names it."""
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return DATASETS.build(dict(type='mmdyt.SVHN', **options))


def test_images_and_labels(root, images):
    dataset = build(data_root=str(root), split='train')
    assert len(dataset) == 4
    assert dataset.get_gt_labels().tolist() == [1, 0, 9, 5]
    assert all((dataset[i]['img'] == images[i]).all() for i in range(4))
    assert dataset.metainfo['classes'] == tuple('0123456789')


def test_the_config_turns_rgb_arrays_into_what_files_give(root, repo_config):
    pipeline = repo_config.train_dataloader.dataset.pipeline
    sample = build(data_root=str(root), pipeline=pipeline)[0]
    assert sample['inputs'].shape == (3, 224, 224)
    blue, green, red = sample['inputs'].flatten(1).float().mean(dim=1)
    assert (blue, green, red) == (0, 0, 255)  # mmpretrain reads files as BGR, and the preprocessor swaps
    assert sample['data_samples'].gt_label.item() == 1


@pytest.fixture
def repo_config(request) -> Config:
    return Config.fromfile(request.config.rootpath / 'configs/dyt/vitb_svhn.py', import_custom_modules=False)


def test_a_missing_file_is_named_with_the_remedy(root):
    expected = f'data_root must hold test_32x32.mat, got {root} without it. Get it from '
    with pytest.raises(FileNotFoundError, match=re.escape(expected) + '.*, or set download=True'):
        build(data_root=str(root), split='test')


def test_another_file_is_refused(root):
    (root / 'test_32x32.mat').write_bytes(b'half of a download')
    with pytest.raises(ValueError, match='test_32x32.mat must be the file of http://.*, got another or a part of it'):
        build(data_root=str(root), split='test')


def test_unknown_splits_are_refused(root):
    with pytest.raises(ValueError, match=re.escape("split must be one of ['train', 'test', 'extra'], got 'val'.")):
        build(data_root=str(root), split='val')


def test_download_only_if_asked_for(root, monkeypatch):
    calls = []
    monkeypatch.setattr(svhn, 'download_url', lambda *args: calls.append(args))
    build(data_root=str(root))
    assert calls == []
    build(data_root=str(root), download=True)
    url, name, md5 = TorchvisionSVHN.split_list['train']
    assert calls == [(url, root, name, md5)]


def test_download_by_one_process_only(root, monkeypatch):
    calls = []
    monkeypatch.setattr(svhn, 'download_url', lambda *args: calls.append(args))
    monkeypatch.setattr(svhn.dist, 'is_main_process', lambda: False)
    assert len(build(data_root=str(root), download=True)) == 4
    assert calls == []


def test_the_check_before_training_knows_it():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        with pytest.raises(FileNotFoundError, match='set.data_root must name an existing folder, got /no'):
            check_data(ConfigDict(type='mmdyt.SVHN', data_root='/no'), 'set')
        check_data(ConfigDict(type='mmdyt.SVHN', data_root='/no', download=True), 'set')
