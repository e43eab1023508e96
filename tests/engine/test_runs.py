"""Runs that are known once they are done: commands, results, files, resuming. The training process is a stand-in."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config

from mmdyt.engine import runs
from mmdyt.engine.finite import EXIT_CODE
from mmdyt.engine.runs import (
    Run,
    known,
    last_step,
    last_validation,
    parse_options,
    split_word,
    train,
)
from mmdyt.files import hold, write_json, write_text

MARKS = dict(config='c', data='d', source='s')
SCRIPT = Path('tools/train.py')
TRAINED = dict(loss=0.5, lr=0.1, epoch=2, iter=6, step=6)
TESTED = {'accuracy/top1': 75.0, 'gmacs': 1.2, 'step': 2}


@pytest.fixture
def run(tmp_path):
    return Run('lora', 'config.py', tmp_path / 'lora', ('randomness.seed=1',), 'lora', ('rank=4',), True)


def log(folder, *rows, time='20240101_000000'):
    (folder / time / 'vis_data').mkdir(parents=True, exist_ok=True)
    text = ''.join(json.dumps(row) + '\n' for row in rows)
    (folder / time / 'vis_data' / 'scalars.json').write_text(text)


@pytest.fixture
def process(monkeypatch):
    """What takes the place of the training process: ``rows`` are logged, ``text`` is printed; keeps the commands."""
    state = SimpleNamespace(rows=[TRAINED, TESTED], text='training\n', code=0, commands=[])

    def stand_in(command, stdout, **options):
        state.commands.append(command)
        stdout.write(state.text)
        if not state.code:
            log(Path(command[command.index('--work-dir') + 1]), *state.rows, time=f'20240101_{len(state.commands):06}')
        return SimpleNamespace(returncode=state.code)

    monkeypatch.setattr(subprocess, 'run', stand_in)
    return state


def test_command_says_everything(run):
    expected = [sys.executable, 'tools/train.py', 'config.py', '--work-dir', str(run.folder), '--amp']
    method = ['--method', 'lora', '--method-options', 'rank=4', '--cfg-options', 'randomness.seed=1']
    assert run.command(SCRIPT) == expected + method
    assert run.command(SCRIPT, Path('epoch_1.pth')) == [*expected, '--resume', 'epoch_1.pth', *method]
    assert Run('x', 'config.py', Path('dir')).command(SCRIPT) == [*expected[:4], 'dir']


def test_request_is_that_of_the_command(run):
    request = run.request()
    assert request.cfg_options == {'randomness.seed': 1} and request.method_options == dict(rank=4)
    assert (request.config, request.method, request.work_dir) == ('config.py', 'lora', str(run.folder))


@pytest.mark.parametrize(
    ('word', 'expected'),
    [
        ('lora', ('lora', ())),
        ('lora+evidence,adapter=None,target_rate=0.5', ('lora+evidence', ('adapter=None', 'target_rate=0.5'))),
        ('a/b.py,tuned=x,y,model.rank=2', ('a/b.py', ('tuned=x,y', 'model.rank=2'))),
    ],
)
def test_words_are_split(word, expected):
    assert split_word(word) == expected


def test_options_are_read_as_by_the_tools():
    read = parse_options('--cfg-options', ['a.b=1', 'c=None', 'd=x,y', 'e=[1,2]', 'f=-1', 'g=a=b'])
    assert read == {'a.b': 1, 'c': None, 'd': ['x', 'y'], 'e': [1, 2], 'f': -1, 'g': 'a=b'}
    assert parse_options('--cfg-options', ()) == {}
    with pytest.raises(ValueError, match=r'--method-options must be key=value, got rank\.'):
        parse_options('--method-options', ['rank'])


def test_a_result_is_kept_and_known(run, process, capsys):
    first = train(run, MARKS, 2, SCRIPT, dict(seed=1))
    assert first.state == 'done' and first.metrics == {'accuracy/top1': 75.0, 'gmacs': 1.2} and first.seconds >= 0
    assert known(run, MARKS) == first
    kept = json.loads((run.folder / 'result.json').read_text())
    assert kept['marks'] == MARKS and kept['about'] == dict(seed=1) and kept['amp'] is True
    assert kept['run'] == dict(
        config='config.py', options=['randomness.seed=1'], method='lora', method_options=['rank=4']
    )
    assert capsys.readouterr().out == f'lora: trains, see {run.folder / "output.txt"}\n'
    assert (run.folder / 'output.txt').read_text() == 'training\n'


@pytest.mark.parametrize('name', MARKS)
def test_a_result_of_other_marks_is_not_known(run, process, capsys, name):
    train(run, MARKS, 2, SCRIPT)
    capsys.readouterr()
    assert known(run, MARKS | {name: 'other'}) is None
    assert capsys.readouterr().out.endswith(f'result.json was written with another {name}\n')


GOOD = dict(format=1, marks=MARKS, metrics={}, state='done', seconds=1.0, about={})


@pytest.mark.parametrize(
    ('text', 'reason'),
    [
        ('', 'is broken'),
        (json.dumps(GOOD)[:40], 'is broken'),
        ('accuracy 75', 'is broken'),
        (b'\xff\xfe\x00', 'is broken'),
        ('[1, 2]', 'is no result of this version'),
        ('{"digest": "abc", "result": {"accuracy": 75}}', 'is no result of this version'),
        (json.dumps(GOOD | dict(format=0)), 'is no result of this version'),
        (json.dumps(GOOD | dict(metrics=None)), 'is no result: metrics missing or wrong'),
        (json.dumps(GOOD | dict(marks=['c'])), 'is no result: marks missing or wrong'),
        (json.dumps({key: value for key, value in GOOD.items() if key != 'seconds'}), 'seconds missing or wrong'),
        (json.dumps(GOOD | dict(state='maybe')), 'state missing or wrong'),
    ],
    ids=['empty', 'truncated', 'no JSON', 'no text', 'list', 'foreign', 'older', 'none', 'kind', 'key', 'state'],
)
def test_a_broken_file_is_said_and_computed_again(run, process, capsys, text, reason):
    run.folder.mkdir()
    file = run.folder / 'result.json'
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert known(run, MARKS) is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f'lora: trains again, {file} ') and reason in line
    train(run, MARKS, 2, SCRIPT)
    assert known(run, MARKS).metrics['gmacs'] == 1.2


def test_a_run_that_never_was_is_silently_unknown(run, capsys):
    assert known(run, MARKS) is None and not capsys.readouterr().out


def test_a_failed_run_tells_its_last_line_and_is_not_kept(run, process):
    process.code, process.text = 1, 'Traceback\nRuntimeError: out of memory\n\n'
    found = train(run, MARKS, 2, SCRIPT)
    assert (found.state, found.reason, found.metrics) == ('failed', 'RuntimeError: out of memory', {})
    assert known(run, MARKS) is None
    process.text = ''
    assert train(replace(run, folder=run.folder / 'b'), MARKS, 2, SCRIPT).reason == 'no output'


def test_a_run_without_its_last_validation_failed(run, process):
    found = train(run, MARKS, 3, SCRIPT)
    assert (found.state, found.reason) == ('failed', 'its log has no validation of the last step, 3')


@pytest.mark.parametrize(
    'rows',
    [
        [TRAINED, TESTED | {'accuracy/top1': float('nan')}],
        [TRAINED, TESTED | {'gmacs': float('inf')}],
        [TRAINED | dict(loss=float('nan')), TESTED],
    ],
)
def test_a_run_that_is_not_finite_diverged(run, process, rows):
    process.rows = rows
    assert train(run, MARKS, 2, SCRIPT).state == 'diverged'
    again = known(run, MARKS)
    assert again.state == 'diverged'
    assert all(value is None or abs(value) < 1e9 for value in again.metrics.values())


def test_a_run_that_stopped_for_want_of_numbers_diverged_and_is_not_trained_again(run, process):
    process.code, process.text = EXIT_CODE, 'error: loss must be finite, got loss=nan in iteration 2.\n'
    found = train(run, MARKS, 2, SCRIPT)
    assert (found.state, found.metrics) == ('diverged', {})
    assert found.reason == 'error: loss must be finite, got loss=nan in iteration 2.'
    assert known(run, MARKS).state == 'diverged'


def checkpoint(folder, name):
    torch.save(dict(state_dict={}), folder / name)


def broken_off(run, process):
    """Start a run that fails; what it wrote as checkpoints is up to the test."""
    process.code = 1
    train(run, MARKS, 8, SCRIPT)
    process.code, process.rows = 0, [TRAINED, TESTED | dict(step=8)]
    process.commands.clear()


def test_a_run_that_was_broken_off_goes_on(run, process, capsys):
    broken_off(run, process)
    for name in ('epoch_9', 'epoch_10', 'epoch_2', 'best'):
        checkpoint(run.folder, f'{name}.pth')
    (run.folder / 'epoch_7.pth').write_bytes((run.folder / 'epoch_2.pth').read_bytes()[:100])  # while it was written
    checkpoint(run.folder, 'epoch_3.pth')
    capsys.readouterr()
    assert train(run, MARKS, 8, SCRIPT).state == 'done'
    (command,) = process.commands
    assert command[command.index('--resume') + 1] == str(run.folder / 'epoch_3.pth')
    assert capsys.readouterr().out.startswith('lora: goes on from epoch_3.pth, see ')
    assert (run.folder / 'output.txt').read_text() == 'training\ntraining\n'


def test_iterations_go_on_too(run, process):
    broken_off(run, process)
    for number in (3, 6, 8):
        checkpoint(run.folder, f'iter_{number}.pth')
    train(run, MARKS, 8, SCRIPT)
    assert str(run.folder / 'iter_6.pth') in process.commands[0]


def test_a_run_of_other_marks_starts_anew(run, process):
    broken_off(run, process)
    checkpoint(run.folder, 'epoch_3.pth')
    os.utime(run.folder / 'epoch_3.pth', (1, 1))
    assert train(run, MARKS | dict(data='other'), 8, SCRIPT).state == 'done'
    assert train(run, MARKS | dict(data='other'), 8, SCRIPT).state == 'done'  # the checkpoint is older than the run
    assert not any('--resume' in command for command in process.commands)


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"marks"'])
def test_a_broken_note_of_the_start_starts_anew(run, process, text):
    broken_off(run, process)
    checkpoint(run.folder, 'epoch_3.pth')
    (run.folder / 'started.json').write_text(text)
    train(run, MARKS, 8, SCRIPT)
    assert '--resume' not in process.commands[0]


def test_the_last_step_of_the_latest_run_counts(tmp_path):
    for time, accuracies in (('20240101_000000', [1.0, 2.0]), ('20240102_000000', [90.0, 50.0])):
        rows = [{'accuracy/top1': value, 'step': i + 1} for i, value in enumerate(accuracies)]
        log(tmp_path, rows[0], dict(loss=1.0, step=2), rows[1], time=time)
    assert last_validation(tmp_path, 2) == last_validation(tmp_path, None) == {'accuracy/top1': 50.0}
    assert last_validation(tmp_path, 3) is None and last_validation(tmp_path / 'none', 2) is None


@pytest.mark.parametrize(
    ('cfg', 'expected'),
    [
        (dict(train_cfg=dict(by_epoch=True, max_epochs=8)), 8),
        (dict(train_cfg=dict(max_iters=60), default_hooks=dict(logger=dict(log_metric_by_epoch=False))), 60),
        (dict(train_cfg=dict(max_iters=60)), None),
        (dict(train_cfg=dict(max_epochs=8), default_hooks=dict(logger=dict(log_metric_by_epoch=False))), None),
    ],
)
def test_last_step_is_named_as_the_log_names_it(cfg, expected):
    assert last_step(Config(cfg)) == expected


def test_real_logs_of_iterations_are_read(trained):
    found = last_validation(trained, 6)
    assert 0 <= found['mIoU'] <= 100 and found['gmacs'] > 0 and 'step' not in found
    assert runs.last_loss(trained) > 0


def test_a_file_is_written_wholly_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / 'result.json'
    write_json(file, dict(a=1))

    def broken(*args):
        raise OSError('disk full')

    monkeypatch.setattr(os, 'fsync', broken)
    with pytest.raises(OSError, match='disk full'):
        write_text(file, 'half')
    assert json.loads(file.read_text()) == dict(a=1) and list(tmp_path.iterdir()) == [file]


def test_json_has_no_numbers_that_are_none(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / 'x.json', dict(a=float('nan')))
    assert not list(tmp_path.iterdir())


def test_a_run_that_another_process_trains_is_left_to_it(run, process):
    run.folder.mkdir()
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        with hold(run.folder, runs.LOCK):
            os.write(writer, b'x')
            signal.pause()
    assert os.read(reader, 1) == b'x'
    (run.folder / 'result.json').write_text('theirs')
    found = train(run, MARKS, 2, SCRIPT)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert found.state == 'failed' and f'is in use by process {child} on ' in found.reason
    assert not process.commands and (run.folder / 'result.json').read_text() == 'theirs'
