"""Mistakes in mmaction's lists of videos are refused before training, with their file and line."""

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import write_clip
from mmengine.config import ConfigDict
from mmengine.registry import DATASETS, DefaultScope

from mmdyt import compat

compat.install()

import mmaction.datasets  # noqa: E402, F401

from mmdyt.preflight.datasets import check_data  # noqa: E402
from mmdyt.preflight.lists import check_list, video_lines  # noqa: E402


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmaction'):
        yield


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder with ``videos/``; what is in them is not looked at."""
    folder = tmp_path / 'data'
    (folder / 'videos' / 'sub').mkdir(parents=True)
    for name in ('a.mp4', 'b.webm', 'sub/c.mp4', 'with space.mp4', 'bare'):
        (folder / 'videos' / name).write_bytes(b'video')
    (folder / 'videos' / 'empty.mp4').touch()
    (folder / 'sound.txt').write_text(f'a.mp4 0\nsub/../b.webm 1\n{folder}/videos/sub/c.mp4 2\nsub/c 1\nbare 0\n')
    return folder


def videos(data: Path, **options) -> ConfigDict:
    base = dict(type='VideoDataset', data_root=str(data), data_prefix=dict(video='videos'), ann_file='list.txt')
    return ConfigDict(base | dict(pipeline=[]) | options)


def refusal(data: Path, text: str | bytes, **options) -> str:
    """The message about a list with this text."""
    (data / 'list.txt').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r'set\.\w+ must .+, got ') as error:
        check_data(videos(data, **options), 'set', 3)
    return str(error.value)


@pytest.mark.parametrize('ending', ['\n', '\r\n', ''])
@pytest.mark.parametrize('test_mode', [True, False])
def test_a_sound_list_passes_and_mmaction_reads_it(data, ending, test_mode):
    lines = (data / 'sound.txt').read_text().splitlines()
    (data / 'list.txt').write_bytes(((ending or '\n').join(lines) + ending).encode())
    dataset = videos(data, test_mode=test_mode)
    check_data(dataset, 'set', num_classes=3)
    read = DATASETS.build(dataset)
    assert [read[i]['label'] for i in range(len(read))] == [0, 1, 2, 1, 0]
    assert os.path.isfile(read[0]['filename'])


@pytest.mark.parametrize(
    ('line', 'problem'),
    [
        ('b.webm', "'b.webm' has no space between path and label"),
        ('b.webm\t1', r"'b.webm\t1' has no space between path and label"),
        ('', 'it is blank'),
        ('  ', 'it is blank'),
        ('with space.mp4 1', "'with space.mp4 1' has a space elsewhere than between path and label"),
        ('b.webm  1', "'b.webm  1' has a space elsewhere than between path and label"),
        ('b.webm 1 2', "'b.webm 1 2' has a space elsewhere than between path and label"),
        ('b.webm cat', "label 'cat' is no integer"),
        ('b.webm 3', 'label 3 lies outside [0, 3), the classes of the head'),
        ('b.webm -1', 'label -1 lies outside [0, 3), the classes of the head'),
        ('d.mp4 1', "there is no file '{videos}/d.mp4'"),
        ('d 1', "there is no file '{videos}/d'"),
        ('sub 1', "there is no file '{videos}/sub'"),
        ('/a.mp4 1', "there is no file '/a.mp4'"),
        ('empty.mp4 1', "the file '{videos}/empty.mp4' is empty"),
        ('empty 1', "the file '{videos}/empty.mp4' is empty"),
    ],
)
@pytest.mark.parametrize('test_mode', [True, False])
def test_a_bad_line_is_refused_with_file_and_line(data, line, problem, test_mode):
    message = refusal(data, f'a.mp4 0\n{line}\nsub/c.mp4 2\n{line}\n', test_mode=test_mode)
    problem = problem.format(videos=data / 'videos')
    assert message == (
        'set.ann_file must have a line "path label" for each sample, got 2 bad of 4 lines, '
        f'first {data}/list.txt, line 2: {problem}.'
    )


@pytest.mark.parametrize('line', ['b.webm', '', 'b.webm cat', 'with space.mp4 1', 'b.webm  1', 'b.webm 1 2'])
def test_what_is_refused_gives_no_label(data, line):
    """mmaction fails without naming the line, or takes a line without label for one with label -1."""
    refusal(data, f'a.mp4 0\n{line}\n')
    try:
        label = DATASETS.build(videos(data))[1]['label']
    except ValueError as error:
        assert 'list.txt' not in str(error)
    else:
        assert label == -1


def test_an_empty_list_is_refused(data):
    assert refusal(data, '') == f'set.ann_file must list at least one sample, got an empty file, {data}/list.txt.'


def test_a_byte_order_mark_is_part_of_the_first_path_and_named(data):
    message = refusal(data, b'\xef\xbb\xbfa.mp4 0\nb.webm 1\n')
    assert 'got 1 bad of 2 lines' in message and 'list.txt, line 1: there is no file' in message
    assert message.endswith('save the list without its byte order mark.')


def test_other_encodings_are_refused_with_the_line(data):
    message = refusal(data, b'a.mp4 0\n' * 5000 + 'grün.mp4 1\n'.encode('latin-1'))
    assert message == f'set.ann_file must be UTF-8 text, got other bytes in {data}/list.txt, line 5001.'


@pytest.mark.parametrize(
    ('delimiter', 'line', 'bad', 'problem'),
    [
        (',', 'with space.mp4, 1', 'a.mp4 1', "'a.mp4 1' has no ',' between path and label"),
        (None, 'a.mp4 \t 1', 'with space.mp4 1', "'with space.mp4 1' has a white space elsewhere than between path"),
        ('\t', 'with space.mp4\t1', 'a.mp4\tb\t1', r"'a.mp4\tb\t1' has a '\t' elsewhere than between path and label"),
    ],
)
def test_other_delimiters_are_read_as_mmaction_reads_them(data, delimiter, line, bad, problem):
    (data / 'list.txt').write_text(f'{line}\n')
    dataset = videos(data, delimiter=delimiter)
    check_data(dataset, 'set', num_classes=3)
    assert DATASETS.build(dataset)[0]['label'] == 1
    message = refusal(data, f'{line}\n{bad}\n', delimiter=delimiter)
    form = 'path label' if delimiter is None else f'path{delimiter}label'
    assert f'must have a line "{form}" for each' in message and f'line 2: {problem}' in message


def test_several_labels_where_the_data_set_has_them(data):
    options = dict(multi_class=True, num_classes=3)
    (data / 'list.txt').write_text('a.mp4 0 2\nb.webm 1\n')
    check_data(videos(data, **options), 'set', num_classes=3)
    assert DATASETS.build(videos(data, **options))[0]['label'].tolist() == [1, 0, 1]
    message = refusal(data, 'a.mp4 0 2\nb.webm 1 3\n', **options)
    assert '"path label label ..."' in message and 'line 2: label 3 lies outside [0, 3)' in message
    assert 'label -1 lies outside' in refusal(data, 'a.mp4 0 -1\n', **options)  # it would count from the end
    assert "'a.mp4' has no space" in refusal(data, 'a.mp4\n', **options)  # it would have no label at all


@pytest.mark.parametrize(
    ('number', 'classes', 'expected'),
    [
        (None, 3, '3, the classes of the head, with multi_class, got None.'),
        (4, 3, '3, the classes of the head, with multi_class, got 4.'),
        (None, None, 'set with multi_class, got None.'),
    ],
)
def test_the_number_of_several_labels_is_that_of_the_head(data, number, classes, expected):
    (data / 'list.txt').write_text('a.mp4 0\n')
    with pytest.raises(ValueError) as error:
        check_data(videos(data, multi_class=True, num_classes=number), 'set', classes)
    assert str(error.value) == f'set.num_classes must be {expected}'


@pytest.mark.parametrize('prefix', [dict(video='videos'), dict(video='videos/'), dict(video='{data}/videos')])
def test_paths_are_joined_as_mmaction_joins_them(data, prefix):
    prefix = {name: path.format(data=data) for name, path in prefix.items()}
    check_data(videos(data, ann_file='sound.txt', data_prefix=prefix), 'set', num_classes=3)
    check_data(videos(data, ann_file=str(data / 'sound.txt'), data_prefix=prefix), 'set', num_classes=3)
    bare = videos(data, ann_file=str(data / 'sound.txt'), data_prefix=dict(video=str(data / 'videos')))
    del bare['data_root']
    check_data(bare, 'set', num_classes=3)
    del bare['data_prefix']
    with pytest.raises(ValueError, match="got 4 bad of 5 lines.*there is no file 'a.mp4'"):  # not the absolute path
        check_data(bare, 'set', num_classes=3)


def test_a_prefix_under_another_name_or_none_is_refused(data):
    with pytest.raises(ValueError, match=r"set.data_prefix must name video, got {'img': 'videos'}"):
        check_data(videos(data, data_prefix=dict(img='videos'), ann_file='sound.txt'), 'set')
    with pytest.raises(ValueError, match="set.data_prefix must name video, got 'videos'"):
        check_data(videos(data, data_prefix='videos', ann_file='sound.txt'), 'set')


def test_a_data_set_without_a_list_is_refused(data):
    with pytest.raises(ValueError, match="set.ann_file must name a list of videos, got ''"):
        check_data(videos(data, ann_file=''), 'set')


def test_missing_lists_and_folders_are_named(data):
    with pytest.raises(FileNotFoundError, match='set.ann_file must name an existing file, got .*/gone.txt'):
        check_data(videos(data, ann_file='gone.txt'), 'set')
    with pytest.raises(FileNotFoundError, match='set.data_prefix.video must name an existing folder, got .*/gone'):
        check_data(videos(data, ann_file='sound.txt', data_prefix=dict(video='gone')), 'set')


@pytest.mark.parametrize(
    'step', [dict(type='DecordInit', io_backend='petrel'), dict(type='mmdyt.OpenClip', io_backend='petrel')]
)
def test_videos_that_lie_elsewhere_are_not_looked_for(data, step):
    import mmdyt.datasets.clips  # noqa: F401

    (data / 'list.txt').write_text('key 0\n')
    check_data(videos(data, pipeline=[step]), 'set', num_classes=3)
    assert 'label 3 lies' in refusal(data, 'key 3\n', pipeline=[step])
    for here in (dict(type=step['type']), dict(type=step['type'], io_backend='disk')):
        assert 'there is no file' in refusal(data, 'key 0\n', pipeline=[here])


def test_lists_inside_wrappers_are_checked(data):
    (data / 'list.txt').write_text('a.mp4 9\n')
    concat = dict(type='ConcatDataset', datasets=[videos(data)])
    with pytest.raises(ValueError, match=r'set.dataset.datasets\[0\].ann_file must .* line 1: label 9'):
        check_data(ConfigDict(type='RepeatDataset', times=2, dataset=concat), 'set', num_classes=3)


def test_lines_are_checked_where_files_are_not_looked_for(data):
    (data / 'list.txt').write_text('gone.mp4 0\nempty.mp4 1\n')
    wrapped = ConfigDict(type='RepeatDataset', times=2, dataset=videos(data))
    check_data(wrapped, 'set', num_classes=3, files=False)
    with pytest.raises(ValueError, match='got 2 bad of 2 lines, first .* there is no file'):
        check_data(wrapped, 'set', num_classes=3)
    (data / 'list.txt').write_text('gone.mp4 9\n')
    with pytest.raises(ValueError, match='line 1: label 9 lies'):
        check_data(wrapped, 'set', num_classes=3, files=False)


def test_lists_of_repeated_augmentation_are_checked(data):
    """Its class insists on certain transforms when it is built."""
    pipeline = [dict(type='DecordInit'), dict(type='SampleFrames', clip_len=2), dict(type='DecordDecode')]
    assert 'label 9 lies' in refusal(data, 'a.mp4 9\n', type='RepeatAugDataset', pipeline=pipeline)
    (data / 'list.txt').write_text('a.mp4 2\n')
    check_data(videos(data, type='RepeatAugDataset', pipeline=pipeline), 'set', num_classes=3)


def test_other_data_sets_of_mmaction_and_a_users_own_are_left_alone(data):
    from mmaction.datasets import VideoDataset

    class OwnFormat(VideoDataset):
        def load_data_list(self):
            return [dict(filename='a.mp4', label=0)]

    class OwnConstructor(VideoDataset):
        def __init__(self, ann_file, pipeline=()):
            super().__init__(ann_file=ann_file, pipeline=pipeline)

    (data / 'list.txt').write_text('no list of videos\n')
    for kind in (OwnFormat, OwnConstructor):
        DATASETS.register_module(module=kind, name=f'test_video_lists_{kind.__name__}', force=True)
        own = ConfigDict(type=f'test_video_lists_{kind.__name__}', ann_file=str(data / 'list.txt'))
        check_data(own, 'set', num_classes=3)
    check_data(videos(data, type='RawframeDataset', data_prefix=dict(img='videos')), 'set', num_classes=3)


def test_no_video_is_opened(data, monkeypatch):
    import builtins

    opened, real_open = [], builtins.open
    monkeypatch.setattr(builtins, 'open', lambda file, *a, **k: opened.append(str(file)) or real_open(file, *a, **k))
    check_list(str(data / 'sound.txt'), str(data / 'videos'), 'set', 3, lines=video_lines())
    assert opened == [str(data / 'sound.txt')]


def test_a_list_that_passes_is_read_by_the_pipeline(data):
    import mmdyt.datasets.clips  # noqa: F401

    write_clip(data / 'videos' / 'clip.mp4', np.zeros((4, 32, 32, 3), np.uint8))
    (data / 'list.txt').write_text('clip.mp4 2\n')
    steps = [dict(type='mmdyt.OpenClip'), dict(type='SampleFrames', clip_len=2), dict(type='mmdyt.DecodeClip')]
    dataset = videos(data, pipeline=steps)
    check_data(dataset, 'set', num_classes=3)
    assert len(DATASETS.build(dataset)[0]['imgs']) == 2
