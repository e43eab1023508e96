"""tools/vtab.py: tasks one after the other, skipped when known, reported when they fail, and the two means."""

import io
import json
import re
import shutil
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY_ARCH, load_tool
from mmengine.config import Config
from tiny_configs import TINY_VTAB_CONFIG, draw_vtab_task


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The tool sets these for itself and its children: restore them."""
    monkeypatch.setenv('VTAB_TASK', 'cifar')
    monkeypatch.setenv('VTAB_ROOT', '/no')


@pytest.fixture(scope='module')
def world(tmp_path_factory, pretrained) -> SimpleNamespace:
    """A tiny config, and a root with two tasks and a third whose test list is missing."""
    folder = tmp_path_factory.mktemp('vtab')
    config, root = folder / 'tiny.py', folder / 'vtab-1k'
    config.write_text(TINY_VTAB_CONFIG.format(root=ROOT, arch=TINY_ARCH, pretrained=pretrained))
    for task, classes in dict(cifar=100, dtd=47, kitti=4).items():
        draw_vtab_task(root / task, classes)
    (root / 'dtd' / 'test.txt').unlink()
    return SimpleNamespace(config=config, root=root)


@pytest.fixture(scope='module')
def ran(tmp_path_factory, run_tool, world) -> SimpleNamespace:
    """A run over all that is there: its work dir, options, exit code and output."""
    work_dir = tmp_path_factory.mktemp('work_dir')
    options = '--root', world.root, '--seed', 3, '--normalization', 'imagenet'
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv('VTAB_TASK', 'cifar')
        patch.setenv('VTAB_ROOT', '/no')
        with pytest.raises(SystemExit) as exit_info:
            run_tool('vtab', world.config, *options, '--work-dir', work_dir)
    return SimpleNamespace(
        work_dir=work_dir, options=options, code=exit_info.value.code, out=out.getvalue(), err=err.getvalue()
    )


@pytest.fixture
def again(ran, world, run_tool, tmp_path, monkeypatch):
    """``again('--val')`` runs the tool in a copy of the work dir; returns the training commands, which all fail."""
    work_dir = tmp_path / 'work_dir'
    shutil.copytree(ran.work_dir, work_dir)
    commands = []

    def run(command, **options):
        commands.append(list(command))
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(subprocess, 'run', run)

    def call(*more, fails=False) -> list[list[str]]:
        try:
            run_tool('vtab', world.config, *ran.options, '--work-dir', work_dir, *more)
        except SystemExit as stop:
            assert stop.code == 1 and (fails or commands)
        else:
            assert not fails and not commands
        return commands

    return call


@pytest.fixture(scope='module')
def groups() -> dict:
    return Config.fromfile(ROOT / 'configs/_base_/datasets/vtab1k.py').vtab_groups


@pytest.mark.slow
def test_results_are_those_of_the_last_epoch(ran):
    report = json.loads((ran.work_dir / 'vtab.json').read_text())
    assert list(report['tasks']) == ['cifar', 'kitti']
    for task, result in report['tasks'].items():
        (log,) = (ran.work_dir / task).glob('*/vis_data/scalars.json')
        tests = [row for row in map(json.loads, log.read_text().splitlines()) if 'accuracy/top1' in row]
        assert [row['step'] for row in tests] == [1, 2]
        assert result['accuracy'] == tests[1]['accuracy/top1']
        assert result['activation_rate'] == tests[1]['activation_rate'] and 0 < result['activation_rate'] < 1
        assert result['gmacs'] == tests[1]['gmacs'] > 0


@pytest.mark.slow
def test_report_says_what_the_results_depend_on(ran, world):
    report = json.loads((ran.work_dir / 'vtab.json').read_text())
    assert report['config'] == str(world.config)
    assert (report['epochs'], report['seed'], report['normalization'], report['amp']) == (2, 3, 'imagenet', False)
    assert report['tested_on'] == 'test.txt'
    assert report['versions'].keys() == {'mmdyt', 'mmpretrain', 'mmengine', 'torch'}


@pytest.mark.slow
def test_settings_reach_the_training(ran, world):
    for task, classes in dict(cifar=100, kitti=4).items():
        (file,) = (ran.work_dir / task).glob('*/vis_data/config.py')
        cfg = Config.fromfile(file)
        assert cfg.train_dataloader.dataset.data_root == str(world.root / task)
        assert cfg.train_dataloader.dataset.ann_file == 'train800val200.txt'
        assert cfg.model.head.num_classes == classes
        assert (cfg.randomness.seed, cfg.model.data_preprocessor.normalization) == (3, 'imagenet')


@pytest.mark.slow
def test_a_failing_task_is_reported_and_the_rest_run(ran):
    assert ran.code == 1
    assert re.search(r'^dtd: failed, error: val_dataloader.dataset.ann_file must name an existing file', ran.err, re.M)
    assert json.loads((ran.work_dir / 'vtab.json').read_text())['failed'] == ['dtd']


@pytest.mark.slow
def test_table(ran):
    assert re.search(r'^task +accuracy % +rate +GMACs$', ran.out, re.M)
    for task in ('cifar', 'kitti'):
        assert re.search(rf'^{task} +\d+\.\d\d +0\.\d{{3}} +0\.\d{{3}}$', ran.out, re.M)
    assert re.search(r'^natural \(7\) +-$', ran.out, re.M) and re.search(r'^mean of 19 tasks +-$', ran.out, re.M)
    assert 'No mean of natural: caltech101, dtd, ' in ran.out


@pytest.mark.slow
def test_known_results_are_not_computed_again(again):
    assert [Path(command[4]).name for command in again()] == ['dtd']  # the one that failed


@pytest.mark.slow
@pytest.mark.parametrize('text', ['', '{"digest"', '[]', '{"digest": "a", "result": {"accuracy": 1.0}}'])
def test_broken_results_are_computed_again(again, tmp_path, capsys, text):
    (tmp_path / 'work_dir' / 'kitti' / 'result.json').write_text(text)
    assert [Path(command[4]).name for command in again('--tasks', 'kitti', 'cifar')] == ['kitti']
    assert re.search(r'^kitti: trains again, .*result\.json is ', capsys.readouterr().out, re.M)


@pytest.mark.slow
def test_a_run_that_diverged_has_no_accuracy(again, tmp_path, capsys):
    file = tmp_path / 'work_dir' / 'kitti' / 'result.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(state='diverged')))
    assert not again('--tasks', 'kitti', fails=True)
    out, err = capsys.readouterr()
    assert 'kitti: failed, its loss or a metric is not finite' in err
    assert re.search(r'^kitti +diverged$', out, re.M) and re.search(r'^mean of 19 tasks +-$', out, re.M)
    report = json.loads((tmp_path / 'work_dir' / 'vtab.json').read_text())
    assert report['diverged'] == report['failed'] == ['kitti'] and not report['tasks']


@pytest.mark.slow
def test_known_results_fill_the_table(again, ran, capsys):
    again('--tasks', 'kitti', 'cifar')
    rows = [line for line in ran.out.splitlines() if re.match(r'(cifar|kitti) ', line)]
    assert len(rows) == 2
    assert [line for line in capsys.readouterr().out.splitlines() if re.match(r'(cifar|kitti) ', line)] == rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ('option', 'passed'),
    [
        (
            ['--val'],
            ['train_dataloader.dataset.ann_file=train800.txt', 'val_dataloader.dataset.ann_file=val200.txt'],
        ),
        (['--seed', '4'], ['randomness.seed=4']),
        (['--normalization', 'half'], ['model.data_preprocessor.normalization=half']),
        (['--amp'], ['--amp']),
        (['--method', 'lora', '--method-options', 'rank=2'], ['--method', 'lora', '--method-options', 'rank=2']),
        (['--cfg-options', 'model.target_rate=0.7'], ['model.target_rate=0.7']),
    ],
    ids=lambda value: value[0],
)
def test_other_options_compute_again(again, option, passed):
    (command,) = again('--tasks', 'cifar', *option)
    assert set(passed) <= set(command)


def test_both_means(groups):
    accuracy = dict(natural=70.0, specialized=80.0, structured=60.0)
    results = {task: dict(accuracy=accuracy[name]) for name, group in groups.items() for task in group}
    summary = load_tool('vtab').summarize(results, groups)
    assert summary['groups'] == accuracy
    assert summary['mean_of_tasks'] == pytest.approx((7 * 70 + 4 * 80 + 8 * 60) / 19)
    assert summary['mean_of_groups'] == pytest.approx(70)
    assert summary['missing'] == {}


def test_only_complete_groups_have_a_mean(groups):
    tool = load_tool('vtab')
    results = {
        task: dict(accuracy=70.0, activation_rate=None, gmacs=17.58)
        for group in groups.values()
        for task in group
        if task != 'kitti'
    }
    summary = tool.summarize(results, groups)
    assert summary['groups'] == dict(natural=70.0, specialized=70.0, structured=None)
    assert summary['mean_of_tasks'] is None and summary['mean_of_groups'] is None
    table = tool.report(results, summary, groups)
    assert 'No mean of structured: kitti missing.' in table
    assert re.search(r'^natural \(7\) +70\.00$', table, re.M) and re.search(r'^cifar +70\.00 +- +17\.580$', table, re.M)


@pytest.mark.parametrize(
    ('args', 'expected'),
    [
        (['--tasks', 'cifar10'], "--tasks must be among ['cifar', 'caltech101', "),
        (['--tasks', 'svhn'], '--tasks must be folders of {root}, got svhn. There are '),
        (['--root', '/no'], '--root must name an existing folder, got /no.'),
        (['--root', '{empty}'], '--root must hold folders named as the tasks ['),
        (['--cfg-options', 'train_cfg'], '--cfg-options must be key=value, got train_cfg.'),
    ],
)
def test_refusals(run_tool, world, tmp_path, capfd, args, expected):
    (tmp_path / 'empty').mkdir()
    args = [arg.format(root=world.root, empty=tmp_path / 'empty') for arg in args]
    with pytest.raises(SystemExit) as exit_info:
        run_tool('vtab', world.config, '--root', world.root, '--work-dir', tmp_path / 'work_dir', *args)
    assert exit_info.value.code == 2
    (message,) = capfd.readouterr().err.splitlines()
    assert message.startswith('error: ' + expected.format(root=world.root)) and ', got ' in message
    assert not (tmp_path / 'work_dir').exists()


@pytest.mark.parametrize(
    ('config', 'expected'),
    [
        ('configs/dyt/vitb_vtab.py', 'config must name an existing file, got configs/dyt/vitb_vtab.py.'),
        ('configs/dyt/vitb_cifar100.py', 'config must have _base_/datasets/vtab1k.py as a base, got '),
    ],
)
def test_refused_configs(run_tool, world, tmp_path, capfd, config, expected):
    with pytest.raises(SystemExit) as exit_info:
        run_tool('vtab', config, '--root', world.root, '--work-dir', tmp_path / 'work_dir')
    assert exit_info.value.code == 2
    (message,) = capfd.readouterr().err.splitlines()
    assert message.startswith(f'error: {expected}')
    assert not (tmp_path / 'work_dir').exists()
