"""docs/predict.md: its Python runs as it stands, on tiny models."""

import re
import shutil
from pathlib import Path

import pytest
from predicting import make_checkpoint

PAGE = Path(__file__).parents[2] / 'docs/predict.md'
BLOCKS = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL)


@pytest.fixture(scope='module')
def folder(tmp_path_factory, tiny_cls_config, tiny_config, tiny_video_config, ade_root) -> Path:
    """The files that the page names."""
    made = tmp_path_factory.mktemp('page')
    for name, config in dict(cls=tiny_cls_config, seg=tiny_config, clips=tiny_video_config).items():
        make_checkpoint(config, made).rename(made / f'{name}.pth')
        shutil.copy(config, made / f'{name}.py')
    shutil.copy(tiny_cls_config.parent / 'test0.png', made / 'cat.jpg')
    shutil.copy(ade_root / 'images/validation/0.png', made / 'street.jpg')
    shutil.copy(tiny_video_config.parent / 'videos/val0.mp4', made / 'clip.mp4')
    (made / 'broken.mp4').write_bytes(b'no video')
    return made


def test_there_are_examples_of_ours_and_of_each_inferencer():
    assert len(BLOCKS) == 5


@pytest.mark.parametrize('block', BLOCKS, ids=range(len(BLOCKS)))
def test_examples_run(folder, monkeypatch, capsys, block):
    monkeypatch.chdir(folder)
    exec(block.replace("'cuda'", "'cpu'"), {})
    printed = capsys.readouterr().out
    assert printed.strip() and ('broken.mp4: skipped' in printed) == ('broken.mp4' in block)
