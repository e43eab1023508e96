"""tools/check_clips.py names every broken clip of a config's lists, and writes lists without them."""

import numpy as np
import pytest
from conftest import ROOT, write_clip

CONFIG = """
_base_ = ['{root}/configs/dyt/vitti_gmdcsa24.py']
dataset = dict(data_root='{data}', data_prefix=dict(video='videos'))
train_dataloader = dict(dataset=dict(ann_file='train.txt', **dataset))
val_dataloader = dict(dataset=dict(ann_file='val.txt', **dataset))
test_dataloader = val_dataloader
"""


@pytest.fixture
def config(tmp_path):
    """Three sound clips, one that is too short and one that is none."""
    videos = tmp_path / 'videos'
    videos.mkdir()
    for name, count in (('a', 12), ('b', 12), ('c', 12), ('short', 5)):
        write_clip(videos / f'{name}.mp4', np.full((count, 32, 40, 3), 90, np.uint8))
    (videos / 'noise.mp4').write_bytes(b'no video' * 100)
    (tmp_path / 'train.txt').write_text('a.mp4 0\nnoise.mp4 1\nb.mp4 2\nshort.mp4 3\n')
    (tmp_path / 'val.txt').write_text('c.mp4 0\n')
    path = tmp_path / 'config.py'
    path.write_text(CONFIG.format(root=ROOT, data=tmp_path))
    return path


def code_of(run_tool, *args) -> int:
    with pytest.raises(SystemExit) as exit_info:
        run_tool('check_clips', *args)
    return exit_info.value.code


@pytest.mark.parametrize('reader', ['decord', 'pyav'])
def test_broken_clips_are_named_and_left_out_of_the_new_lists(tmp_path, config, run_tool, capsys, reader):
    option = [f'{loop}_dataloader.dataset.pipeline.0.reader={reader}' for loop in ('train', 'val', 'test')]
    args = [config, '--workers', 1, '--out', tmp_path / 'sound', '--cfg-options', *option]
    assert code_of(run_tool, *args) == 1
    said = capsys.readouterr().out
    assert f'train.txt, line 2: filename must name a sound video, got {tmp_path}/videos/noise.mp4: ' in said
    assert 'train.txt, line 4: filename must name a video of at least 8 frames' in said
    assert 'train.txt: 2 of 4 clips are broken.' in said and 'val.txt: 0 of 1 clips are broken.' in said
    assert (tmp_path / 'sound/train.txt').read_text() == 'a.mp4 0\nb.mp4 2\n'
    assert (tmp_path / 'sound/val.txt').read_text() == 'c.mp4 0\n'
    lists = [f'{loop}_dataloader.dataset.ann_file={tmp_path}/sound/{name}.txt'
             for loop, name in (('train', 'train'), ('val', 'val'), ('test', 'val'))]  # fmt: skip
    assert code_of(run_tool, config, '--workers', 1, '--cfg-options', *lists) == 0


def test_missing_and_empty_files_are_left_out_of_the_new_lists(tmp_path, config, run_tool, capsys):
    (tmp_path / 'videos/empty.mp4').touch()
    (tmp_path / 'train.txt').write_text('gone.mp4 0\na.mp4 1\nempty.mp4 2\ngone 3\nb 3')
    assert code_of(run_tool, config, '--workers', 1, '--out', tmp_path / 'sound') == 1
    said = capsys.readouterr().out
    for line, name, reason in ((1, 'gone.mp4', 'there is no such file'), (3, 'empty.mp4', 'it is empty'),
                               (4, 'gone.mp4', 'there is no such file')):  # fmt: skip
        assert (
            f'train.txt, line {line}: filename must name a sound video, got {tmp_path}/videos/{name}: {reason}' in said
        )
    assert 'train.txt: 3 of 5 clips are broken.' in said
    assert (tmp_path / 'sound/train.txt').read_text() == 'a.mp4 1\nb 3\n'


def test_a_list_without_a_sound_clip_becomes_an_empty_one(tmp_path, config, run_tool):
    (tmp_path / 'val.txt').write_text('noise.mp4 0\n')
    assert code_of(run_tool, config, '--workers', 1, '--out', tmp_path / 'sound') == 1
    assert (tmp_path / 'sound/val.txt').read_text() == ''  # a blank line would be a bad one


WRAPPERS = """
_base_ = ['{base}']
val_dataloader = dict(dataset=dict(
    _delete_=True, type='ConcatDataset', datasets=[{{{{_base_.val_dataloader.dataset}}}}]))
train_dataloader = dict(dataset=dict(
    _delete_=True, type='RepeatDataset', times=2, dataset={{{{_base_.train_dataloader.dataset}}}}))
"""


def test_lists_inside_wrappers_are_read(tmp_path, config, run_tool, capsys):
    path = tmp_path / 'wrapped.py'
    path.write_text(WRAPPERS.format(base=config))
    assert code_of(run_tool, path, '--workers', 1) == 1
    said = capsys.readouterr().out
    assert 'train.txt: 2 of 4 clips are broken.' in said and 'val.txt: 0 of 1 clips are broken.' in said
    options = ['--cfg-options', 'train_dataloader.dataset.dataset.pipeline=[]']
    assert code_of(run_tool, path, *options) == 2
    assert 'train_dataloader.dataset.dataset.pipeline must read clips with ' in capsys.readouterr().err


@pytest.mark.parametrize('strict', ['train', 'val', 'test'])
def test_a_list_that_loops_share_is_read_as_each_of_them_does(tmp_path, config, run_tool, capsys, strict):
    """However its path is spelt, and in whatever order they come."""
    names = dict(train=f'{tmp_path}/train.txt', val=f'{tmp_path}/videos/../train.txt', test='train.txt')
    options = [f'{loop}_dataloader.dataset.ann_file={name}' for loop, name in names.items()]
    options += [f'{loop}_dataloader.dataset.pipeline.0.min_frames={8 if loop == strict else 1}' for loop in names]
    args = [config, '--workers', 1, '--out', tmp_path / 'sound', '--cfg-options', *options]
    assert code_of(run_tool, *args) == 1
    said = capsys.readouterr().out
    assert said.count('clips are broken.') == 1 and 'train.txt: 2 of 4 clips are broken.' in said
    assert said.count('line 2: ') == said.count('line 4: ') == 1
    assert (tmp_path / 'sound/train.txt').read_text() == 'a.mp4 0\nb.mp4 2\n'


def test_a_list_is_read_whole_where_a_run_takes_a_part_of_it(tmp_path, config, run_tool, capsys):
    """Else other lines would be left out than those of the broken clips."""
    options = ['--cfg-options', 'train_dataloader.dataset.indices=[2,3]']
    assert code_of(run_tool, config, '--workers', 1, '--out', tmp_path / 'sound', *options) == 1
    assert (tmp_path / 'sound/train.txt').read_text() == 'a.mp4 0\nb.mp4 2\n'


def names_only(tmp_path) -> list[str]:
    """Options for lists of one name in two folders."""
    for loop in ('train', 'val'):
        (tmp_path / loop).mkdir()
        (tmp_path / f'{loop}.txt').rename(tmp_path / loop / 'list.txt')
    loops = dict(train='train', val='val', test='val')
    return ['--cfg-options'] + [f'{loop}_dataloader.dataset.ann_file={name}/list.txt' for loop, name in loops.items()]


def test_no_new_list_takes_the_place_of_another(tmp_path, config, run_tool, capfd, monkeypatch):
    monkeypatch.setattr('mmdyt.datasets.clips.OpenClip.transform', lambda *args: pytest.fail('a clip was read'))
    options = names_only(tmp_path)
    before = {path: path.read_text() for path in tmp_path.rglob('list.txt')}
    assert code_of(run_tool, config, '--out', tmp_path / 'sound', *options) == 2
    message = (
        f"--out must be given with lists of different names, got ['{tmp_path}/train/list.txt', '{tmp_path}/val/list"
    )
    assert message in capfd.readouterr().err and not (tmp_path / 'sound').exists()
    assert {path: path.read_text() for path in tmp_path.rglob('list.txt')} == before


@pytest.mark.parametrize('link', ['', 'symlink_to', 'hardlink_to'])
def test_no_list_is_overwritten(tmp_path, config, run_tool, capfd, monkeypatch, link):
    """Least of all one that is read, under whatever name."""
    monkeypatch.setattr('mmdyt.datasets.clips.OpenClip.transform', lambda *args: pytest.fail('a clip was read'))
    there = tmp_path / 'sound/val.txt'
    there.parent.mkdir()
    if link:
        getattr(there, link)(tmp_path / 'train.txt')
    else:
        there.write_text('precious')
    before = there.read_text()
    assert code_of(run_tool, config, '--out', there.parent) == 2
    said = capfd.readouterr().err
    assert ('--out must be another folder than that of the lists' if link else 'a folder without val.txt, got') in said
    assert there.read_text() == before and not (there.parent / 'train.txt').exists()


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['{config}', '--frames', '0'], '--frames must be at least 1, got 0.'),
        (['{config}', '--out', '{folder}'], '--out must be another folder than that of the lists, got '),
        ([f'{ROOT}/configs/demo/pretrain_shapes.py'], 'pipeline must read clips with mmdyt.OpenClip and '),
        (['{config}', '--cfg-options', 'train_dataloader.dataset.ann_file=no.txt'], 'must name an existing file'),
    ],
)
def test_mistakes_are_refused(run_tool, capfd, config, args, message):
    args = [arg.format(config=config, folder=config.parent) for arg in args]
    assert code_of(run_tool, *args) == 2
    assert message in capfd.readouterr().err
