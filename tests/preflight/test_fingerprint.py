"""A fingerprint changes with each thing that matters to a result, and with nothing else."""

import pytest
import torch
from mmengine.config import Config

import mmdyt
from mmdyt.preflight import fingerprint as module
from mmdyt.preflight.fingerprint import digest, fingerprint, source, versions


@pytest.fixture
def world(tmp_path):
    """A folder with two lists, weights, and a config that names them."""
    (tmp_path / 'train.txt').write_text('a.png 0\n')
    (tmp_path / 'test.txt').write_text('b.png 1\n')
    torch.save(dict(state_dict=dict(w=torch.ones(2))), tmp_path / 'vit.pth')
    return tmp_path


def config(world, **more) -> Config:
    def loader(ann_file):
        return dict(dataset=dict(type='CustomDataset', data_root=str(world), ann_file=ann_file))

    backbone = dict(init_cfg=dict(type='Pretrained', checkpoint=str(world / 'vit.pth')))
    loaders = dict(train_dataloader=loader('train.txt'), val_dataloader=loader('test.txt'))
    return Config(dict(default_scope='mmpretrain', model=dict(backbone=backbone), **loaders) | more)


def changed(before, after) -> set[str]:
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize('name', ['train.txt', 'test.txt'])
def test_content_of_lists_counts(world, name):
    before = fingerprint(config(world), False)
    (world / name).write_text('c.png 1\n')
    assert changed(before, fingerprint(config(world), False)) == {'data'}


def test_content_of_weights_counts(world):
    before = fingerprint(config(world), False)
    torch.save(dict(state_dict=dict(w=torch.zeros(2))), world / 'vit.pth')
    assert changed(before, fingerprint(config(world), False)) == {'weights'}


def test_content_of_load_from_counts(world):
    before = fingerprint(config(world, load_from=str(world / 'start.pth')), False)
    (world / 'start.pth').write_bytes(b'other weights')
    assert changed(before, fingerprint(config(world, load_from=str(world / 'start.pth')), False)) == {'weights'}


@pytest.mark.parametrize('more', [dict(randomness=dict(seed=1)), dict(train_cfg=dict(max_epochs=3))])
def test_options_and_seeds_count(world, more):
    assert changed(fingerprint(config(world), False), fingerprint(config(world, **more), False)) == {'config'}


def test_mixed_precision_counts(world):
    assert changed(fingerprint(config(world), False), fingerprint(config(world), True)) == {'config'}


def test_work_dir_does_not_count(world):
    assert fingerprint(config(world, work_dir='a'), False) == fingerprint(config(world, work_dir='b'), False)


def test_versions_count(world, monkeypatch):
    before = fingerprint(config(world), False)
    monkeypatch.setattr(mmdyt, '__version__', '99')
    assert changed(before, fingerprint(config(world), False)) == {'versions'}


@pytest.mark.parametrize(
    ('scope', 'host'), [('mmseg', 'mmsegmentation'), ('mmaction', 'mmaction2'), ('mmpretrain', 'mmpretrain')]
)
def test_versions_name_the_host(scope, host):
    found = versions(Config(dict(default_scope=scope)))
    assert {'mmdyt', 'torch', 'mmengine', 'mmpretrain', host} == set(found)
    assert found['mmdyt'] == mmdyt.__version__ and torch.__version__.startswith(found['torch'])


def test_folders_without_lists_count_by_names_and_sizes(world):
    folder = world / 'images' / 'cat'
    folder.mkdir(parents=True)
    (folder / '0.png').write_bytes(b'0')
    dataset = dict(type='CustomDataset', data_root=str(world), data_prefix='images')

    def marks():
        return fingerprint(config(world, train_dataloader=dict(dataset=dataset)), False)

    first = marks()
    assert marks() == first
    (folder / '0.png').write_bytes(b'00')
    second = marks()
    (folder / '1.png').write_bytes(b'1')
    assert changed(first, second) == changed(second, marks()) == {'data'}


def test_wrapped_data_sets_count(world):
    inner = dict(type='CustomDataset', data_root=str(world), ann_file='train.txt')
    loader = dict(dataset=dict(type='RepeatDataset', times=2, dataset=inner))
    before = fingerprint(config(world, train_dataloader=loader), False)
    (world / 'train.txt').write_text('c.png 1\n')
    assert changed(before, fingerprint(config(world, train_dataloader=loader), False)) == {'data'}


def test_data_that_comes_by_itself_need_not_be_there(world):
    loader = dict(dataset=dict(type='CIFAR100', data_root=str(world / 'cifar'), split='train'))
    before = fingerprint(config(world, train_dataloader=loader), False)
    (world / 'cifar').mkdir()
    (world / 'cifar' / 'train').write_bytes(b'downloaded')
    assert fingerprint(config(world, train_dataloader=loader), False) == before


def test_missing_files_are_left_to_the_checks(world):
    for file in world.iterdir():
        file.unlink()
    assert set(fingerprint(config(world), False)) == {'config', 'data', 'weights', 'versions', 'source'}


@pytest.mark.parametrize(
    ('text', 'counts'),
    [
        ('"""Other words."""\n\n\ndef f(x):\n    """And here."""\n    return x + 1  # a comment\n', False),
        ('"""Doc."""\n\n\ndef f(x):\n    """Doc."""\n    return x + 2\n', True),
        ('def f(x:\n', True),
    ],
)
def test_code_counts_words_do_not(tmp_path, text, counts):
    (tmp_path / 'part.py').write_text('"""Doc."""\n\n\ndef f(x):\n    """Doc."""\n    return x + 1\n')
    before = source(tmp_path)
    (tmp_path / 'part.py').write_text(text)
    assert (source(tmp_path) != before) == counts


def test_what_no_training_runs_does_not_count(tmp_path):
    for name in module.NOT_RUN:
        assert name == '.mim' or (module.PACKAGE / name).exists(), name  # .mim: of an installed wheel
    before = source(tmp_path)
    for name in ('preflight/names.py', '.mim/tools/train.py'):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text('x = 1\n')
    assert source(tmp_path) == before


def test_digest_is_of_all_marks(world):
    marks = fingerprint(config(world), False)
    assert digest(marks) == digest(dict(reversed(marks.items())))
    assert all(digest(marks | {name: 'other'}) != digest(marks) for name in marks)
