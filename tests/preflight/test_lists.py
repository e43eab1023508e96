"""Mistakes in lists of "path label" and in class folders are refused before training, with their file and line."""

import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT, TINY_ARCH
from mmengine.config import ConfigDict

from mmdyt import compat
from mmdyt.preflight.datasets import check_data, head_classes
from mmdyt.preflight.lists import check_class_folders, check_list

CONFIG = """
_base_ = [
    '{root}/configs/_base_/models/dyt_vitb_cls.py',
    '{root}/configs/_base_/datasets/cifar100_1k.py',
    '{root}/configs/_base_/schedules/adamw_vtab1k.py',
    '{root}/configs/_base_/runtime/mmpretrain.py',
]
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, **{arch}), img_size=32, patch_size=16, adapter=dict(bottleneck=4),
        init_cfg=dict(checkpoint='{pretrained}')),
    head=dict(num_classes=3, in_channels=32))
loader = dict(batch_size=3, num_workers=0, persistent_workers=False)
train_dataloader = dict(dataset=dict(data_root='{data}', data_prefix='images', ann_file='train.txt'), **loader)
val_dataloader = dict(dataset=dict(data_root='{data}', data_prefix='images', ann_file='test.txt'), **loader)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=1)
"""


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder with ``images/`` and a sound list of them, in the styles that a path may have."""
    folder = tmp_path / 'data'
    (folder / 'images' / 'sub').mkdir(parents=True)
    for name in ('a.png', 'b.png', 'sub/c.png', 'with space.png'):
        cv2.imwrite(str(folder / 'images' / name), np.zeros((8, 8, 3), np.uint8))
    (folder / 'sound.txt').write_text(f'a.png 0\nsub/../b.png 1\nwith space.png 0\n{folder}/images/sub/c.png 2\n')
    return folder


def custom(data: Path, **options) -> ConfigDict:
    import mmpretrain.datasets  # noqa: F401

    return ConfigDict({'type': 'mmpretrain.CustomDataset', 'data_root': str(data), 'data_prefix': 'images'} | options)


def refusal(data: Path, text: str | bytes, num_classes: int | None = 3, **options) -> str:
    """The message about a list with this text."""
    (data / 'list.txt').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r'set\.ann_file must .+, got ') as error:
        check_data(custom(data, ann_file='list.txt', **options), 'set', num_classes)
    return str(error.value)


@pytest.mark.parametrize('ending', ['\n', '\r\n', ''])
def test_a_sound_list_passes_and_mmpretrain_reads_it(data, ending):
    from mmengine.registry import DATASETS

    lines = (data / 'sound.txt').read_text().splitlines()
    text = (ending or '\n').join(lines) + ending
    (data / 'list.txt').write_bytes(text.encode())
    dataset = custom(data, ann_file='list.txt')
    check_data(dataset, 'set', num_classes=3)
    read = DATASETS.build(dataset)
    assert [read[i]['gt_label'] for i in range(len(read))] == [0, 1, 0, 2]
    assert all(os.path.isfile(read[i]['img_path']) for i in range(len(read)))


@pytest.mark.parametrize(
    ('line', 'problem'),
    [
        ('b.png', "'b.png' has no space between path and label"),
        ('b.png\t1', r"'b.png\t1' has no space between path and label"),
        ('', 'it is blank'),
        ('  ', 'it is blank'),
        ('b.png cat', "label 'cat' is no integer"),
        ('b.png 1.0', "label '1.0' is no integer"),
        ('b.png 3', 'label 3 lies outside [0, 3), the classes of the head'),
        ('b.png -1', 'label -1 lies outside [0, 3), the classes of the head'),
        ('d.png 1', "there is no file '{images}/d.png'"),
        ('sub 1', "there is no file '{images}/sub'"),
        ('no/b.png 1', "there is no file '{images}/no/b.png'"),
        ('/b.png 1', "there is no file '/b.png'"),
        ('B.png 1', "there is no file '{images}/B.png'"),
    ],
)
def test_a_bad_line_is_refused_with_file_and_line(data, line, problem):
    message = refusal(data, f'a.png 0\n{line}\nsub/c.png 2\n{line}\n')
    problem = problem.format(images=data / 'images')
    assert message == (
        'set.ann_file must have a line "path label" for each sample, got 2 bad of 4 lines, '
        f'first {data}/list.txt, line 2: {problem}.'
    )


@pytest.mark.parametrize('line', ['b.png', '', 'b.png cat', 'd.png 1'])
def test_what_is_refused_does_not_load(data, line):
    """None of the refused lines is one that mmpretrain could have used."""
    from mmengine.registry import DATASETS, TRANSFORMS

    refusal(data, f'a.png 0\n{line}\n')
    load = TRANSFORMS.build(dict(type='LoadImageFromFile'))
    with pytest.raises((ValueError, FileNotFoundError)):
        load(DATASETS.build(custom(data, ann_file='list.txt'))[1])


def test_an_empty_list_is_refused(data):
    assert refusal(data, '') == f'set.ann_file must list at least one sample, got an empty file, {data}/list.txt.'


def test_only_one_end_of_line_may_follow_the_last_sample(data):
    assert 'got 1 bad of 2 lines' in (message := refusal(data, 'a.png 0\n\n')) and 'line 2: it is blank' in message


def test_a_byte_order_mark_is_part_of_the_first_path_and_named(data):
    message = refusal(data, b'\xef\xbb\xbfa.png 0\nb.png 1\n')
    assert 'got 1 bad of 2 lines' in message and 'list.txt, line 1: there is no file' in message
    assert message.endswith('save the list without its byte order mark.')


def test_other_encodings_are_refused_with_the_line(data):
    message = refusal(data, b'a.png 0\n' * 5000 + 'grün.png 1\n'.encode('latin-1'))
    assert message == f'set.ann_file must be UTF-8 text, got other bytes in {data}/list.txt, line 5001.'


def test_without_a_number_of_classes_labels_are_integers_only(data):
    (data / 'list.txt').write_text('a.png 700\nb.png -1\n')
    check_data(custom(data, ann_file='list.txt'), 'set', num_classes=None)
    assert 'is no integer' in refusal(data, 'a.png x\n', num_classes=None)


def test_lists_without_labels_have_paths_only(data):
    (data / 'list.txt').write_text('a.png\nwith space.png\n')
    check_data(custom(data, ann_file='list.txt', with_label=False), 'set', num_classes=3)
    message = refusal(data, 'a.png\na.png 0\n\n', with_label=False)
    assert 'must have a line "path" for each sample, got 2 bad of 3 lines' in message
    assert f"line 2: there is no file '{data}/images/a.png 0'." in message
    assert 'line 1: it is blank.' in refusal(data, '\na.png\n', with_label=False)


@pytest.mark.parametrize('prefix', ['images', 'images/', dict(img_path='images'), '{data}/images'])
def test_paths_are_joined_as_mmpretrain_joins_them(data, prefix):
    prefix = prefix.format(data=data) if isinstance(prefix, str) else prefix
    check_data(custom(data, ann_file='sound.txt', data_prefix=prefix), 'set', num_classes=3)
    check_data(custom(data, ann_file=str(data / 'sound.txt'), data_prefix=prefix), 'set', num_classes=3)
    bare = ConfigDict(
        type='mmpretrain.CustomDataset', ann_file=str(data / 'sound.txt'), data_prefix=str(data / 'images')
    )
    check_data(bare, 'set', num_classes=3)
    with pytest.raises(ValueError, match="got 3 bad of 4 lines.*no file '.*/data/a.png'"):  # not the absolute path
        check_data(custom(data, ann_file='sound.txt', data_prefix=''), 'set', num_classes=3)


def test_a_prefix_under_another_name_is_refused(data):
    with pytest.raises(ValueError, match=r"set.data_prefix must name img_path, got {'img': 'images'}"):
        check_data(custom(data, ann_file='sound.txt', data_prefix=dict(img='images')), 'set')


def test_links_are_followed(data):
    (data / 'images' / 'link.png').symlink_to('a.png')
    (data / 'images' / 'broken.png').symlink_to('gone.png')
    assert 'got 1 bad of 2 lines' in (message := refusal(data, 'link.png 0\nbroken.png 0\n')) and 'line 2' in message


def test_each_folder_is_read_once_and_no_image_is_opened(data, monkeypatch):
    import builtins

    read, real = [], os.scandir
    monkeypatch.setattr(os, 'scandir', lambda folder: read.append(str(folder)) or real(folder))
    opened, real_open = [], builtins.open
    monkeypatch.setattr(builtins, 'open', lambda file, *a, **k: opened.append(str(file)) or real_open(file, *a, **k))
    monkeypatch.setattr(os.path, 'isfile', lambda path: pytest.fail(f'{path} was looked up on its own'))
    (data / 'list.txt').write_text('a.png 0\nsub/c.png 1\n' * 50)
    check_list(str(data / 'list.txt'), str(data / 'images'), 'set', 3)
    assert [Path(folder).name for folder in read] == ['images', 'sub']
    assert opened == [str(data / 'list.txt')]


def test_images_of_a_folder_that_cannot_be_listed_are_looked_up(data, monkeypatch):
    def refuse(folder):
        raise PermissionError(folder)

    (data / 'list.txt').write_text('a.png 0\nd.png 0\n')
    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(ValueError, match="got 1 bad of 2 lines.*line 2: there is no file '.*/d.png'"):
        check_list(str(data / 'list.txt'), str(data / 'images'), 'set', 3)


def test_images_that_lie_elsewhere_are_not_looked_for(data):
    (data / 'list.txt').write_text('key_in_a_database 0\n')
    options = dict(ann_file='list.txt', data_prefix='')
    for option in ('backend_args', 'file_client_args'):
        load = dict(type='LoadImageFromFile', **{option: dict(backend='lmdb', db_path='x')})
        check_data(custom(data, pipeline=[load], **options), 'set', num_classes=3)
    assert 'label 3 lies' in refusal(data, 'key 3\n', pipeline=[load], data_prefix='')
    assert 'there is no file' in refusal(data, 'key 0\n', pipeline=[dict(type='LoadImageFromFile')], data_prefix='')


def test_lists_inside_wrappers_are_checked(data):
    (data / 'list.txt').write_text('a.png 9\n')
    inner = custom(data, ann_file='list.txt')
    with pytest.raises(ValueError, match=r'set.dataset.datasets\[0\].ann_file must .* line 1: label 9'):
        concat = dict(type='ConcatDataset', datasets=[inner])
        check_data(ConfigDict(type='RepeatDataset', times=2, dataset=concat), 'set', num_classes=3)


def test_imagenet_finds_its_list_by_its_split(data):
    import mmpretrain.datasets  # noqa: F401

    (data / 'meta').mkdir()
    (data / 'images').rename(data / 'val')
    (data / 'meta' / 'val.txt').write_text('a.png 0\nb.png 1000\n')
    imagenet = ConfigDict(type='mmpretrain.ImageNet', data_root=str(data), split='val')
    with pytest.raises(ValueError, match='meta/val.txt, line 2: label 1000 lies outside'):
        check_data(imagenet, 'set', num_classes=1000)
    check_data(imagenet, 'set', num_classes=1001)


@pytest.mark.parametrize('kind', ['CUB', 'Caltech101', 'DTD', 'Flowers102', 'Food101', 'OxfordIIITPet', 'SUN397'])
def test_data_sets_with_formats_of_their_own_are_left_alone(data, kind):
    import mmpretrain.datasets  # noqa: F401

    (data / 'list.txt').write_text('1 images/a.png more\n')
    check_data(ConfigDict(type=f'mmpretrain.{kind}', data_root=str(data), ann_file='list.txt'), 'set', num_classes=3)


def test_a_users_own_data_set_is_left_alone(data):
    from mmengine.registry import DATASETS
    from mmpretrain.datasets import CustomDataset

    class OwnFormat(CustomDataset):
        def load_data_list(self):
            return [dict(img_path='a.png', gt_label=0)]

    class OwnConstructor(CustomDataset):
        def __init__(self, ann_file, pipeline=()):
            super().__init__(ann_file=ann_file, data_root='elsewhere', pipeline=pipeline)

    (data / 'list.txt').write_text('no list\n')
    for kind in (OwnFormat, OwnConstructor):
        DATASETS.register_module(module=kind, name=f'test_lists_{kind.__name__}', force=True)
        dataset = ConfigDict(type=f'test_lists_{kind.__name__}', ann_file=str(data / 'list.txt'))
        check_data(dataset, 'set', num_classes=3)


def test_class_folders_may_not_exceed_the_head(data):
    for name in ('cat', 'dog', 'bird', '.hidden'):
        (data / 'images' / name).mkdir()
    with pytest.raises(ValueError) as error:
        check_data(custom(data), 'set', num_classes=3)
    assert str(error.value) == (
        'set must have at most 3 class folders, the classes of the head, '
        f"got 4 in {data}/images, first ['bird', 'cat', 'dog']. Set num_classes of the head to their number."
    )
    for number in (4, 5, None):
        check_data(custom(data), 'set', number)
    check_data(custom(data, with_label=False), 'set', 3)


def test_class_folders_are_counted_as_mmpretrain_counts_them(data):
    from mmpretrain.datasets.custom import find_folders

    compat.install()
    for name in ('cat', '.hidden'):
        (data / 'images' / name).mkdir()
    number = len(find_folders(str(data / 'images'))[0])
    check_class_folders(str(data / 'images'), 'set', number)
    with pytest.raises(ValueError, match=f'got {number} in'):
        check_class_folders(str(data / 'images'), 'set', number - 1)


def test_a_folder_without_class_folders_is_refused(data):
    with pytest.raises(ValueError, match='set must have a folder for each class in .*/sub, got none. Or set its ann_f'):
        check_data(custom(data, data_prefix='images/sub'), 'set', num_classes=3)


@pytest.mark.parametrize(
    ('model', 'number'),
    [
        (dict(head=dict(num_classes=7)), 7),
        (dict(cls_head=dict(num_classes=7)), 7),
        (dict(type='TTA', module=dict(module=dict(head=dict(num_classes=7)))), 7),
        (dict(decode_head=dict(num_classes=7)), None),
        (dict(head=None), None),
        (dict(head=dict(type='Head')), None),
        (dict(head=dict(num_classes=0)), None),  # its constructor refuses that
        (dict(head=dict(num_classes='7')), None),
    ],
)
def test_number_of_classes_is_that_of_the_classification_head(model, number):
    assert head_classes(ConfigDict(model)) == number


@pytest.mark.parametrize(
    ('text', 'options', 'expected'),
    [
        (
            'a.png 0\nb.png 3\n',
            [],
            'train_dataloader.dataset.ann_file must have a line "path label" for each sample, '
            'got 1 bad of 2 lines, first {data}/train.txt, line 2: '
            'label 3 lies outside [0, 3), the classes of the head.',
        ),
        (
            'a.png 0\nb.png 1\n',
            ['val_dataloader.dataset.ann_file=train.txt', 'val_dataloader.dataset.data_prefix=images/sub'],
            'val_dataloader.dataset.ann_file must have a line "path label" for each sample, '
            "got 2 bad of 2 lines, first {data}/train.txt, line 1: there is no file '{data}/images/sub/a.png'.",
        ),
        (
            'a.png 0\nb.png 1\n',
            ['train_dataloader.dataset.ann_file=', 'model.head.num_classes=1'],
            'train_dataloader.dataset must have at most 1 class folders',
        ),
    ],
    ids=['label', 'image', 'folders'],
)
def test_training_refuses_with_exit_code_2_and_writes_nothing(
    run_tool, pretrained, data, tmp_path, capfd, text, options, expected
):
    (data / 'images' / 'sub2').mkdir()
    (data / 'train.txt').write_text(text)
    (data / 'test.txt').write_text('a.png 0\n')
    config = tmp_path / 'config.py'
    config.write_text(CONFIG.format(root=ROOT, arch=TINY_ARCH, data=data, pretrained=pretrained))
    before = sorted(tmp_path.rglob('*'))
    capfd.readouterr()
    options = ['--cfg-options', *options] if options else []
    with pytest.raises(SystemExit) as exit_info:
        run_tool('train', config, '--work-dir', tmp_path / 'work_dir', *options)
    assert exit_info.value.code == 2
    (message,) = capfd.readouterr().err.splitlines()
    assert message.startswith('error: ' + expected.format(data=data))
    assert re.match(r'error: .*\S+ must .+, got .+', message)
    assert sorted(tmp_path.rglob('*')) == before
