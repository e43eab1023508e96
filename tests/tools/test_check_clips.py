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
