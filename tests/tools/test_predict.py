"""tools/predict.py: three tasks, lines of JSON, pictures, broken files, Ctrl-C, rates and costs."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from predicting import CLASSES, make_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def made(request, tmp_path_factory):
    """``made(config fixture)`` gives the config, its checkpoint, and three inputs."""

    def make(name: str):
        config = request.getfixturevalue(name)
        kinds = dict(tiny_cls_config='test*.png', tiny_video_config='videos/val*.mp4')
        folder = config.parent
        if name == 'tiny_config':
            folder, kinds = request.getfixturevalue('ade_root'), dict(tiny_config='images/validation/*.png')
        return config, make_checkpoint(config, tmp_path_factory.mktemp(name)), sorted(folder.glob(kinds[name]))[:3]

    return make


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / 'predictions.jsonl').read_text().splitlines()]


def refused(run_tool, capfd, *args) -> str:
    """What a tool says that ends with exit code 2."""
    with pytest.raises(SystemExit) as exit_info:
        run_tool('predict', *args)
    assert exit_info.value.code == 2
    return capfd.readouterr().err


@pytest.mark.parametrize('name', ['tiny_cls_config', 'tiny_config', 'tiny_video_config'])
@pytest.mark.parametrize('with_config', [True, False])
def test_predictions_of_a_task(run_tool, made, tmp_path, capfd, name, with_config):
    config, checkpoint, inputs = made(name)
    out = tmp_path / 'out'
    run_tool('predict', *[config] * with_config, checkpoint, *inputs, '--out', out, '--rate', 0.5, '--device', 'cpu')
    lines = lines_of(out)
    assert [line['file'] for line in lines] == [str(path) for path in inputs]
    for line in lines:
        assert line['activation_rate'] == pytest.approx(0.5) and 0 < line['gmacs'] < 1.5 * line['gmacs_dense']
        assert {one['name'] for one in line['top']} <= set(CLASSES)
        assert all(line['rates'][layer] == pytest.approx(0.5) for layer in line['rates']) and len(line['rates']) == 4
    stems = [f'{i:04d}_{path.stem}' for i, path in enumerate(inputs)]
    kinds = ['answer', 'tokens', *(['classes'] if name == 'tiny_config' else [])]
    wanted = {f'{stem}_{kind}.png' for stem in stems for kind in kinds}
    assert {file.name for file in out.iterdir()} == wanted | {'predictions.jsonl', '.lock'}
    for picture in set(out.glob('*.png')) - set(out.glob('*_classes.png')):
        assert cv2.imread(str(picture)).std() > 5
    if name == 'tiny_config':
        labels = cv2.imread(str(out / f'{stems[0]}_classes.png'), cv2.IMREAD_UNCHANGED)
        assert labels.shape == (64, 96)
        largest = lines[0]['top'][0]
        assert largest['score'] == pytest.approx((labels == largest['label']).mean(), abs=1e-5)
    captured = capfd.readouterr()
    assert '3 of 3 inputs' in captured.out and 'all get the same' in captured.err


def test_a_segmentation_is_painted_over_the_whole_image(run_tool, made, tmp_path):
    _, checkpoint, (image, *_) = made('tiny_config')
    run_tool('predict', checkpoint, image, '--out', tmp_path, '--device', 'cpu')
    painted = cv2.imread(str(next(tmp_path.glob('*_answer.png'))))[:64, :96].astype(float)
    labels = cv2.imread(str(next(tmp_path.glob('*_classes.png'))), cv2.IMREAD_UNCHANGED)
    colours = np.array([[0, 0, 250], [0, 250, 0], [250, 0, 0]])[labels]  # blue first
    assert np.abs(painted - (cv2.imread(str(image)) / 2 + colours / 2)).max() <= 1


def test_lines_of_json_on_the_output(run_tool, made, capfd):
    _, checkpoint, inputs = made('tiny_cls_config')
    capfd.readouterr()
    run_tool('predict', checkpoint, *inputs, '--json', '--top', 1, '--device', 'cpu')
    captured = capfd.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [len(line['top']) for line in lines] == [1, 1, 1] and '3/3' in captured.err  # the bar
    run_tool('predict', checkpoint, inputs[0], '--device', 'cpu')
    (line,) = capfd.readouterr().out.splitlines()
    config, checkpoint, clips = made('tiny_video_config')  # mmengine logs which reader the environment asks for
    capfd.readouterr()
    run_tool('predict', config, checkpoint, *clips, '--json', '--device', 'cpu')
    assert [json.loads(line)['file'] for line in capfd.readouterr().out.splitlines()] == [str(clip) for clip in clips]
    assert line.startswith(f'{inputs[0]}: {lines[0]["top"][0]["name"]} 0.') and 'GMACs, rate 0.' in line


def test_a_cost_is_met(run_tool, made, tmp_path):
    _, checkpoint, inputs = made('tiny_cls_config')
    gmacs = {}
    for name, option in dict(all=('--rate', 1), none=('--rate', 1e-6)).items():
        run_tool('predict', checkpoint, inputs[0], *option, '--out', tmp_path, '--no-pictures', '--device', 'cpu')
        gmacs[name] = lines_of(tmp_path)[0]['gmacs']
    assert {file.name for file in tmp_path.iterdir()} == {'predictions.jsonl', '.lock'}
    wanted = (gmacs['all'] + gmacs['none']) / 2 + 1e-12  # two of four tokens
    run_tool('predict', checkpoint, *inputs, '--gmacs', wanted, '--out', tmp_path, '--no-pictures', '--device', 'cpu')
    assert all(line['gmacs'] == pytest.approx(wanted, rel=1e-6) for line in lines_of(tmp_path))


def test_broken_files_are_named_and_skipped_and_the_exit_code_says_so(run_tool, made, tmp_path, capfd):
    _, checkpoint, inputs = made('tiny_cls_config')
    broken = tmp_path / 'broken.png'
    broken.write_bytes(b'no picture')
    listed = tmp_path / 'list.txt'
    listed.write_text(f'{inputs[0]}\nbroken.png\nmissing.png\n{inputs[1]}\n')
    out = tmp_path / 'out'
    with pytest.raises(SystemExit) as exit_info:
        run_tool('predict', checkpoint, listed, '--out', out, '--device', 'cpu')
    assert exit_info.value.code == 1
    errors = capfd.readouterr().err
    assert f'{broken}: skipped' in errors and 'missing.png: skipped' in errors
    assert '2 of 4 inputs were skipped' in errors
    lines = lines_of(out)
    assert ['error' in line for line in lines] == [False, True, True, False]
    assert str(broken) in lines[1]['error'] and lines[3]['top']
    assert len(list(out.glob('*_answer.png'))) == 2


def test_ctrl_c_keeps_what_is_done(made, tmp_path):
    """The real signal, to a real process, once three lines are there."""
    _, checkpoint, inputs = made('tiny_cls_config')
    listed = tmp_path / 'list.txt'
    listed.write_text(f'{inputs[0]}\n' * 100_000)
    out = tmp_path / 'out'
    command = [sys.executable, ROOT / 'tools/predict.py', checkpoint, listed, '--out', out, '--batch-size', '1']
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # else ignored in the background
    options = dict(env=env, stderr=subprocess.PIPE, text=True, preexec_fn=heeds)
    process = subprocess.Popen([*command, '--device', 'cpu'], **options)
    try:
        end = time.monotonic() + 120
        while not ((out / 'predictions.jsonl').exists() and len(lines_of_whole(out)) >= 3):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130 and 'Traceback' not in errors
    lines = lines_of(out)
    assert f'stopped: {len(lines)} of 100000 inputs are done; they are in {out}' in errors
    assert all(line['top'] == lines[0]['top'] for line in lines)
    assert len(lines) <= len(list(out.glob('*_answer.png'))) <= len(lines) + 1


def lines_of_whole(out: Path) -> list[str]:
    """Lines that are there wholly while others are being written."""
    return (out / 'predictions.jsonl').read_text().split('\n')[:-1]


def test_refusals(run_tool, made, tmp_path, capfd):
    config, checkpoint, inputs = made('tiny_cls_config')
    out, file = tmp_path / 'out', tmp_path / 'file'
    file.write_text('')
    for args, expected in [
        (('none.pth', inputs[0]), 'checkpoint must name an existing file, got none.pth'),
        ((config, checkpoint, 'none.png'), 'image must name an existing file or folder, got none.png'),
        ((checkpoint, config), 'image must end with .bmp'),
        ((checkpoint, inputs[0], '--rate', '50'), 'target_rate must lie in (0, 1], got 50'),
        ((checkpoint, inputs[0], '--gmacs', '0'), 'gmacs must be a positive number'),
        ((checkpoint, inputs[0], '--rate', '.5', '--gmacs', '1'), 'not allowed with argument'),
        ((checkpoint, inputs[0], '--top', '0'), 'top must be at least 1, got 0'),
        ((checkpoint, inputs[0], '--method', 'lora'), '--method must come with a config file'),
        ((checkpoint, inputs[0], '--out', file), '--out must be a folder'),
        ((checkpoint,), 'at least one input must be named'),
    ]:
        assert expected in refused(
            run_tool, capfd, *args, '--device', 'cpu', *(() if '--out' in args else ('--out', out))
        )
        assert not out.exists()


def test_a_checkpoint_of_another_model_is_refused(run_tool, made, capfd):
    config, checkpoint, inputs = made('tiny_cls_config')
    options = '--cfg-options', 'model.head.num_classes=7'
    assert 'checkpoint must fit the model' in refused(run_tool, capfd, config, checkpoint, inputs[0], *options)


def test_a_trained_checkpoint_needs_nothing_else(run_tool, trained, ade_root, tmp_path):
    """What ``tools/train.py`` writes: config, class names and colours are in it."""
    folder = ade_root / 'images/validation'
    run_tool('predict', trained / 'iter_6.pth', folder, '--out', tmp_path, '--device', 'cpu')
    lines = lines_of(tmp_path)
    assert len(lines) == 4 and {one['name'] for line in lines for one in line['top']} <= {'sky', 'road', 'car'}
