"""tools/compare.py: methods on one config, known results, tables that grow; most with a stand-in for the training."""

import csv
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import load_tool

from mmdyt.engine.finite import EXIT_CODE

ACCURACY = {'linear': 60.0, 'lora': 73.0, 'dyt': 70.0, 'adapter': 74.0}


@pytest.fixture
def process(monkeypatch):
    """In the place of the training: logs an accuracy; ``broken`` names what fails, the other sets what ends in NaN."""
    state = SimpleNamespace(ran=[], commands=[], broken=set(), diverged=set(), stopped=set(), stop_at=None)

    def stand_in(command, stdout, **options):
        method = command[command.index('--method') + 1]
        (seed,) = (int(part.partition('=')[2]) for part in command if part.startswith('randomness.seed='))
        if state.stop_at == (method, seed):
            raise KeyboardInterrupt
        state.ran.append((method, seed))
        state.commands.append(command)
        if method in state.stopped:
            stdout.write('error: loss must be finite, got loss=nan in iteration 2.\n')
            return SimpleNamespace(returncode=EXIT_CODE)
        if method in state.broken:
            stdout.write('Traceback\nRuntimeError: no memory\n')
            return SimpleNamespace(returncode=1)
        folder = Path(command[command.index('--work-dir') + 1]) / '20240101_000000' / 'vis_data'
        folder.mkdir(parents=True)
        loss = float('nan') if method in state.diverged else 0.5
        rows = [
            dict(loss=loss, iter=24, step=24),
            {'accuracy/top1': ACCURACY[method] + seed, 'gmacs': 1.25, 'step': 8},
        ]
        (folder / 'scalars.json').write_text(''.join(json.dumps(row) + '\n' for row in rows))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, 'run', stand_in)
    return state


@pytest.fixture
def compare(run_tool, tiny_cls_config, tmp_path):
    """``compare('lora', '--seeds', 0)`` runs the tool without timing; returns its exit code."""

    def call(*args, work_dir=tmp_path / 'out', timing=('--no-timing',)) -> int:
        try:
            run_tool('compare', tiny_cls_config, '--work-dir', work_dir, *timing, '--methods', *args)
        except SystemExit as stop:
            return stop.code
        return 0

    return call


def table(folder) -> dict[str, list[str]]:
    """The cells of the table by method."""
    lines = [line for line in (folder / 'compare.md').read_text().splitlines() if line.startswith('| ')]
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    return {row[0]: row[1:] for row in cells[1:]}


def test_methods_and_seeds_become_a_table(compare, process, tmp_path, capsys):
    assert compare('linear', 'lora,rank=2', '--seeds', 0, 2) == 0
    assert process.ran == [('linear', 0), ('lora', 0), ('linear', 2), ('lora', 2)]
    out, (printed, err) = tmp_path / 'out', capsys.readouterr()
    lora_numbers = ['74.00 ± 1.41', '2', '0.001', '0.000', '1.250', '-', '-']
    assert table(out) == {
        'linear': ['61.00 ± 1.41', '2', '0.000', '0.000', '1.250', '-', '-'],
        'lora,rank=2': lora_numbers,
    }
    assert '[3/4] linear seed 2: trains, see ' in printed and '[3/4] linear seed 2: done in 0:00:0' in printed
    assert re.search(r'1 to go, about 0:00:\d\d', printed) and '| lora,rank=2 | 74.00' in printed and not err
    assert (out / 'compare.png').read_bytes().startswith(b'\x89PNG')


def test_files_for_programs(compare, process, tmp_path, tiny_cls_config):
    compare('linear', 'lora', '--seeds', 0, 1, '--cfg-options', 'model.head.topk=(1,)')
    rows = list(csv.DictReader((tmp_path / 'out' / 'compare.csv').open()))
    assert [(row['method'], float(row['mean']), row['seeds']) for row in rows] == [
        ('linear', 60.5, '2'),
        ('lora', 73.5, '2'),
    ]
    report = json.loads((tmp_path / 'out' / 'compare.json').read_text())
    assert (report['config'], report['metric'], report['amp']) == (str(tiny_cls_config), 'accuracy/top1', False)
    assert report['options'] == ['model.head.topk=(1,)'] and '--methods' in report['command']
    assert {'mmdyt', 'torch', 'mmengine', 'mmpretrain'} == set(report['versions'])
    (linear, lora) = report['methods']
    assert linear['tuned'] == 0 and lora['tuned'] == 4 * 2 * 2 * 8 * 32 / 1e6  # layers, q and v, down and up, rank, C
    assert linear['head'] == lora['head'] == 33 * 3 / 1e6
    assert {seed: run['metrics']['accuracy/top1'] for seed, run in lora['runs'].items()} == {'0': 73, '1': 74}
    assert {run['state'] for run in lora['runs'].values()} == {'done'}


def test_training_is_told_everything(compare, process):
    compare('lora,rank=2,scale=0.5', '--amp', '--seeds', 3, '--cfg-options', 'train_cfg.max_epochs=8')
    (command,) = process.commands
    rest = command[command.index('--work-dir') + 2 :]
    assert rest == [
        *('--amp', '--method', 'lora', '--method-options', 'rank=2', 'scale=0.5'),
        *('--cfg-options', 'train_cfg.max_epochs=8', 'randomness.seed=3'),
    ]


def test_known_results_are_not_trained_again_and_stay_in_the_table(compare, process, tmp_path, capsys):
    compare('linear', 'lora')
    process.ran.clear()
    assert compare('lora', 'dyt', '--seeds', 0, 1) == 0
    assert process.ran == [('dyt', 0), ('lora', 1), ('dyt', 1)]
    assert '[1/4] lora seed 0: known from ' in capsys.readouterr().out
    found = table(tmp_path / 'out')
    assert list(found) == ['lora', 'dyt', 'linear'] and [found[m][1] for m in found] == ['2', '2', '1']


@pytest.mark.slow
def test_results_of_other_settings_are_not_in_the_table_and_not_lost(compare, process, tmp_path, capsys):
    compare('linear', 'lora')
    compare('lora', '--cfg-options', 'optim_wrapper.optimizer.lr=0.5')
    assert list(table(tmp_path / 'out')) == ['lora'] and len(process.ran) == 3
    assert 'lora-seed0-' in (text := capsys.readouterr().out) and ', which had another config' in text
    compare('lora')
    assert list(table(tmp_path / 'out')) == ['lora', 'linear'] and len(process.ran) == 3


@pytest.mark.slow
def test_another_source_is_another_result_unless_any_will_do(compare, process, tmp_path, monkeypatch, capsys):
    from mmdyt.preflight import fingerprint

    compare('linear', 'lora')
    monkeypatch.setattr(fingerprint, 'source', lambda: 'changed')
    assert compare('lora', '--any-source') == 0
    assert len(process.ran) == 2 and list(table(tmp_path / 'out')) == ['lora', 'linear']
    capsys.readouterr()
    compare('lora')
    assert len(process.ran) == 3 and list(table(tmp_path / 'out')) == ['lora']
    assert ', which had another source\n' in capsys.readouterr().out
    compare('lora', '--any-source')
    assert len(process.ran) == 3
    assert "The results are of 2 states of mmdyt's source." in (tmp_path / 'out' / 'compare.md').read_text()


def test_another_machine_is_told_and_other_versions_are_another_result(compare, process, tmp_path, monkeypatch):
    from mmdyt.preflight import fingerprint

    compare('linear')
    monkeypatch.setattr(fingerprint, 'version', lambda package: '9.9')
    compare('lora', '--any-source')
    assert list(table(tmp_path / 'out')) == ['lora', 'linear']
    assert 'They are of 2 kinds of machine' in (tmp_path / 'out' / 'compare.md').read_text()
    machines = json.loads((tmp_path / 'out' / 'compare.json').read_text())['machines']
    assert [machine['versions']['torch'] == '9.9' for machine in machines].count(True) == 1
    compare('lora')
    assert list(table(tmp_path / 'out')) == ['lora']


def test_what_fails_is_told_and_the_others_go_on(compare, process, tmp_path, capsys):
    process.broken, process.diverged = {'linear'}, {'dyt'}
    assert compare('linear', 'dyt', 'lora') == 1
    assert '[1/3] linear seed 0: failed, RuntimeError: no memory\n' in capsys.readouterr().err
    found = table(tmp_path / 'out')
    assert [row[:2] for row in found.values()] == [['-', '0, 1 failed'], ['-', '0, 1 diverged'], ['73.00', '1']]
    assert 'linear seed 0: failed, RuntimeError: no memory' in (tmp_path / 'out' / 'compare.md').read_text()
    process.broken = set()
    assert compare('linear', 'dyt', 'lora') == 0
    assert process.ran[3:] == [('linear', 0)]


def test_what_diverged_is_marked_and_not_averaged(compare, process, tmp_path, capsys):
    process.stopped, process.diverged = {'lora'}, {'dyt'}
    assert compare('lora', 'dyt', 'linear') == 0
    err = capsys.readouterr().err
    assert '[1/3] lora seed 0: diverged, error: loss must be finite, got loss=nan in iteration 2.\n' in err
    assert '[2/3] dyt seed 0: diverged, its loss or a metric is not finite\n' in err
    found = table(tmp_path / 'out')
    assert [row[:2] for row in found.values()] == [['-', '0, 1 diverged'], ['-', '0, 1 diverged'], ['60.00', '1']]
    assert compare('lora', 'dyt', 'linear') == 0 and len(process.ran) == 3  # a result, too


@pytest.mark.slow
def test_a_comparison_that_was_broken_off_goes_on(compare, process, tmp_path, capsys):
    process.stop_at = ('lora', 1)
    assert compare('linear', 'lora', '--seeds', 0, 1) == 130
    assert 'Stopped. What is done is kept' in capsys.readouterr().err
    assert table(tmp_path / 'out')['linear'][1] == '2' and table(tmp_path / 'out')['lora'][1] == '1'
    process.stop_at = None
    assert compare('linear', 'lora', '--seeds', 0, 1) == 0
    assert process.ran == [('linear', 0), ('lora', 0), ('linear', 1), ('lora', 1)]


def test_a_broken_result_is_computed_again(compare, process, tmp_path, capsys):
    compare('lora')
    (file,) = tmp_path.glob('out/runs/*/result.json')
    file.write_text(file.read_text()[:50])
    for log in file.parent.glob('*/vis_data/scalars.json'):
        log.parent.rename(log.parent.with_name('old'))
    assert compare('lora') == 0
    assert len(process.ran) == 2 and f'trains again, {file} is broken' in capsys.readouterr().out
    assert table(tmp_path / 'out')['lora'][0] == '73.00'


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['linear', 'lorra'], 'lorra: --method must be among ['),
        (['linear', 'lorra'], "got 'lorra'. Did you mean lora?"),
        (['lora,rnk=2'], "lora,rnk=2: --method-options must name one of ['adapter', "),
        (['lora,rnk=2'], "got 'rnk'. Did you mean rank?"),
        (['lora,rank'], 'lora,rank: --method must be among ['),
        (['lora,rank=0'], 'lora,rank=0: rank must '),
        (['lora', 'lora'], '--methods must differ, got lora twice.'),
        (['lora,rank=2,scale=1', 'lora,scale=1,rank=2'], '--methods must differ, got lora,scale=1,rank=2 twice.'),
        (['lora', '--seeds', '1', '1'], '--seeds must differ, got 1 twice.'),
        (['lora', '--rounds', '0'], '--rounds must be at least 1, got 0.'),
        (['lora', '--cfg-options', 'train_cfg'], '--cfg-options must be key=value, got train_cfg.'),
        (['lora', '--cfg-options', 'val_dataloader=None'], 'config must set val_dataloader, got none in '),
        (['lora', '--cfg-options', 'train_dataloader.dataset.ann_file=no.txt'], 'must name an existing file, got '),
        (['lora', '--cfg-options', 'model.backbone.init_cfg.checkpoint=no.pth'], 'must name an existing file, got no'),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(compare, process, tmp_path, capsys, args, message):
    assert compare(*args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and message in line
    assert not (tmp_path / 'out').exists() and not process.ran


def test_files_are_no_folders(compare, process, tmp_path, capsys):
    (tmp_path / 'file').touch()
    assert compare('lora', work_dir=tmp_path / 'file') == 2
    assert f'--work-dir must be a folder, got {tmp_path / "file"}.' in capsys.readouterr().err


def test_a_step_that_cannot_be_timed_costs_no_results(compare, process, tmp_path, monkeypatch, capsys):
    from mmdyt.engine import step_time

    def no_memory(*args):
        raise RuntimeError('out of memory')

    monkeypatch.setattr(step_time, 'Step', no_memory)
    assert compare('lora', 'adapter', timing=()) == 0
    assert 'lora: no step time, out of memory' in capsys.readouterr().err
    assert table(tmp_path / 'out')['lora'] == ['73.00', '1', '0.004', '0.000', '1.250', '-', '-']
    assert table(tmp_path / 'out')['adapter'][-1] == '1.00'


def test_work_dir_is_named_after_the_config(monkeypatch):
    monkeypatch.setattr('sys.argv', ['compare.py', 'configs/dyt/vitb_ssv2.py', '--methods', 'lora'])
    assert load_tool('compare').parse_args().work_dir == Path('work_dirs/compare_vitb_ssv2')


def test_real_trainings(compare, tmp_path):
    short = ['--cfg-options', 'train_cfg.max_epochs=2', 'train_cfg.val_interval=2']
    assert compare('linear', 'dyt,adapter.bottleneck=2', *short, timing=('--rounds', 1)) == 0
    report = json.loads((tmp_path / 'out' / 'compare.json').read_text())
    linear, dyt = report['methods']
    for row in (linear, dyt):
        (log,) = (tmp_path / 'out' / 'runs').glob(f'{row["method"][:3]}*/*/vis_data/scalars.json')
        last = json.loads(log.read_text().splitlines()[-1])
        assert row['mean'] == last['accuracy/top1'] and row['gmacs'] == last['gmacs'] > 0
        assert row['step_time'] == row['timing']['ratio'] > 0
    assert linear['rate'] is None and 0 < dyt['rate'] <= 1 and linear['tuned'] == 0
    assert dyt['tuned'] == 4 * (2 * 2 * 32 + 2 + 32 + 33) / 1e6  # layers; adapter of 2, its biases, dispatcher
