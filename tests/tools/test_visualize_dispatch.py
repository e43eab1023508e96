"""tools/visualize_dispatch.py and the hook: pictures, charts and the page of test data, files and folders."""

import json
import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.runner import set_random_seed

from mmdyt import preflight
from mmdyt.datasets.files import find_files
from mmdyt.engine.visualize.hook import DispatchVisualizationHook

CHARTS = {'rates.png', 'costs.png'}
OF_LABELS = {'classes.png', 'boundaries.png'}


@pytest.fixture
def checkpoint(tmp_path):
    """``checkpoint(config)`` is that of a model whose gates differ between tokens."""
    import torch
    from mmengine.runner import save_checkpoint

    from mmdyt.core.fit.calibrate import token_dispatchers

    def make(config) -> Path:
        cfg = Config.fromfile(config)
        cfg.work_dir, cfg.custom_hooks = str(tmp_path / 'made'), []
        set_random_seed(0)
        runner = preflight.build_runner(cfg)
        for dispatcher in token_dispatchers(runner.model).values():
            torch.nn.init.normal_(dispatcher.gate.weight)
        meta = dict(dataset_meta=dict(classes=('red', 'green', 'blue'), palette=[[9, 0, 0], [0, 9, 0], [0, 0, 9]]))
        save_checkpoint(dict(state_dict=runner.model.state_dict(), meta=meta), str(tmp_path / 'model.pth'))
        logging.getLogger('mmengine').handlers.clear()
        return tmp_path / 'model.pth'

    return make


@pytest.mark.parametrize('name', ['tiny_config', 'tiny_cls_config', 'tiny_video_config'])
def test_test_data(run_tool, request, checkpoint, tmp_path, name):
    config, out = request.getfixturevalue(name), tmp_path / 'out'
    run_tool('visualize_dispatch', config, checkpoint(config), '--out', out, '--number', 3, '--device', 'cpu')
    samples = json.loads((out / 'numbers.json').read_text())['samples']
    files = {file.name for file in out.iterdir()}
    found = json.loads((out / 'numbers.json').read_text())
    if name == 'tiny_config':
        pixels = {key: sum(one['pixels'] for one in found[key].values()) for key in found if key.startswith('by_')}
        assert len(pixels) == 2 and len(set(pixels.values())) == 1  # each labelled pixel is in one group of either
    else:
        assert list(found) == ['samples']
    assert files >= {'index.html'} | CHARTS | (OF_LABELS if name == 'tiny_config' else set())
    assert len([file for file in files if file[0].isdigit()]) == len(samples) == 3
    assert len({sample['file'] for sample in samples}) == 3
    for sample in samples:
        assert 0 <= sample['activation_rate'] <= 1 and 0 < sample['gmacs'] < 1.5 * sample['gmacs_dense']
    assert (out / 'index.html').read_text().count('data:image/') >= 3


def test_files_and_folders(run_tool, tiny_config, checkpoint, tmp_path):
    folder = tmp_path / 'pictures <&> "own"'
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate([(40, 100), (64, 64), (33, 47)]):
        cv2.imwrite(str(folder / f'{i}.png'), rng.integers(0, 255, (height, width, 3), np.uint8))
    (folder / 'notes.txt').write_text('no picture')
    out = tmp_path / 'out'
    args = tiny_config, checkpoint(tiny_config), folder, folder / '1.png', '--out', out, '--device', 'cpu'
    run_tool('visualize_dispatch', *args)
    samples = json.loads((out / 'numbers.json').read_text())['samples']
    assert [Path(sample['file']).name for sample in samples] == ['0.png', '1.png', '2.png', '1.png']
    assert samples[1] == samples[3]


@pytest.mark.parametrize(('name', 'kind'), [('tiny_cls_config', 'test*.png'), ('tiny_video_config', 'videos/val*.mp4')])
def test_files_of_the_other_tasks(run_tool, request, checkpoint, tmp_path, name, kind):
    config = request.getfixturevalue(name)
    files = sorted(Path(config).parent.glob(kind))[:2]
    run_tool('visualize_dispatch', config, checkpoint(config), *files, '--out', tmp_path / 'out', '--device', 'cpu')
    samples = json.loads((tmp_path / 'out' / 'numbers.json').read_text())['samples']
    assert [sample['file'] for sample in samples] == [str(file) for file in files]


@pytest.mark.parametrize(
    ('args', 'expected'),
    [
        (('none.png',), 'image must name an existing file or folder, got none.png.'),
        ((__file__,), 'image must end with .bmp, .jpeg'),
        (('--number', '0'), '--number must be at least 1, got 0.'),
    ],
)
def test_refusals(run_tool, capfd, tiny_cls_config, checkpoint, tmp_path, args, expected):
    with pytest.raises(SystemExit) as exit_info:
        run_tool('visualize_dispatch', tiny_cls_config, checkpoint(tiny_cls_config), *args, '--out', tmp_path / 'out')
    assert exit_info.value.code == 2 and expected in capfd.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_folders_without_pictures_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match='must hold a file that ends with .avi'):
        find_files([tmp_path], video=True)


@pytest.mark.parametrize(
    'name',
    ['tiny_config', *(pytest.param(f'tiny_{task}_config', marks=pytest.mark.slow) for task in ('cls', 'video'))],
)
def test_the_hook_draws_after_a_test(request, tmp_path, name):
    cfg = Config.fromfile(request.getfixturevalue(name))
    cfg.work_dir = str(tmp_path)
    cfg.custom_hooks = [dict(type='mmdyt.FLOPsHook'), dict(type='mmdyt.DispatchVisualizationHook', number=2)]
    set_random_seed(0)
    runner = preflight.build_runner(cfg)
    alone = runner.test()
    folder = Path(runner.log_dir, 'dispatch_test')
    pictures = [file for file in folder.iterdir() if file.name[0].isdigit()]
    assert len(pictures) == 2 and (folder / 'index.html').is_file() and {f.name for f in folder.iterdir()} >= CHARTS
    assert 0 <= alone['activation_rate'] <= 1
    images = list(Path(runner.log_dir, 'vis_data', 'vis_image').glob('dispatch_*.png'))
    assert len(images) == 2
    lines = [json.loads(line) for line in Path(runner.log_dir, 'costs_test.jsonl').read_text().splitlines()]
    assert len(lines) == len(runner.test_dataloader.dataset)


def test_numbers_of_the_hook_are_refused():
    with pytest.raises(ValueError, match='number must be at least 1, got 0'):
        DispatchVisualizationHook(number=0)
