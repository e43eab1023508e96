"""tools/train.py and tools/test.py on tiny clips; the class of a clip is its colour."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import write_clip


@pytest.fixture(scope='module')
def config(tiny_video_config):
    return tiny_video_config


@pytest.fixture(scope='module')
def work_dir(tmp_path_factory, config, run_tool):
    folder = tmp_path_factory.mktemp('trained_clips')
    run_tool('train', config, '--work-dir', folder)
    return folder


def rows(work_dir):
    (log,) = work_dir.glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in log.read_text().splitlines()]


def result_of(folder):
    (file,) = folder.glob('*/*.json')
    return json.loads(file.read_text())


def test_training_learns_and_logs_every_loss(work_dir):
    *steps, evaluation = rows(work_dir)
    assert {'loss_cls', 'loss_rate', 'complete.loss_cls', 'loss_distill', 'activation_rate'} < set(steps[0])
    assert all(math.isfinite(step['loss']) for step in steps)
    assert evaluation['acc/top1'] >= 0.6  # chance is 0.33
    assert 0 < evaluation['activation_rate'] <= 1 and evaluation['views'] == 3
    assert evaluation['gmacs'] == pytest.approx(3 * evaluation['gmacs_view'])
    assert {f'activation_rate/layer_{i}' for i in range(4)} < set(evaluation)


def test_testing_repeats_the_result_of_training_however_views_are_batched(tmp_path, config, work_dir, run_tool):
    for views in (None, 2):
        folder = tmp_path / str(views)
        option = f'model.test_cfg.max_testing_views={views}'
        run_tool('test', config, work_dir / 'epoch_8.pth', '--work-dir', folder, '--cfg-options', option)
        for name in ('acc/top1', 'activation_rate', 'gmacs', 'gmacs_dense', 'gmacs_view'):
            assert result_of(folder)[name] == pytest.approx(rows(work_dir)[-1][name]), name


def test_the_complete_model_is_tested_by_name(tmp_path, config, work_dir, run_tool):
    run_tool('test', config, work_dir / 'epoch_8.pth', '--work-dir', tmp_path, '--complete')
    assert result_of(tmp_path)['activation_rate'] == 1 > rows(work_dir)[-1]['activation_rate']


@pytest.mark.parametrize(
    'options',
    [
        ['model.backbone.dispatcher=None'],
        pytest.param(['model.backbone.dispatcher=None', 'model.backbone.adapter=None'], marks=pytest.mark.slow),
        pytest.param(
            ['model.backbone.adapter.type=mmdyt.MoEAdapter', 'model.neck.aggregator.temporal_positions=8'],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ['model.neck.adapter.type=mmdyt.MoEAdapter', 'model.neck.aggregator.fold_projections=True'],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ['model.backbone.out_type=featmap', 'model.neck=None', 'model.cls_head.type=I3DHead'],
            marks=pytest.mark.slow,
        ),
    ],
    ids=['adapter', 'linear', 'moe_temporal', 'moe_neck_folded', 'stock_head'],
)
def test_baselines_and_variants_train_and_test(tmp_path, config, run_tool, options):
    short = ['train_cfg.max_epochs=1', 'train_cfg.val_interval=1']
    run_tool('train', config, '--work-dir', tmp_path, '--amp', '--cfg-options', *short, *options)
    evaluation = rows(tmp_path)[-1]
    dispatched = 'model.backbone.dispatcher=None' not in options
    assert ('activation_rate' in evaluation) == dispatched
    assert evaluation['gmacs_view'] > 0


@pytest.mark.slow
def test_a_resumed_run_repeats_the_unbroken_one(tmp_path, config, run_tool):
    short = [
        'train_cfg.max_epochs=2',
        'default_hooks.checkpoint.interval=1',
        'default_hooks.checkpoint.max_keep_ckpts=3',
    ]
    run_tool('train', config, '--work-dir', tmp_path / 'whole', '--cfg-options', *short)
    first = tmp_path / 'whole/epoch_1.pth'
    run_tool('train', config, '--work-dir', tmp_path / 'resumed', '--resume', first, '--cfg-options', *short)
    whole, resumed = (torch.load(tmp_path / name / 'epoch_2.pth')['state_dict'] for name in ('whole', 'resumed'))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('train0.mp4', "line 2: 'train0.mp4' has no"),
        ('train0.mp4 3', 'line 2: label 3 lies outside [0, 3), the classes of the head'),
        ('train0.mp4 x', "line 2: label 'x' is no integer"),
        ('no.mp4 0', 'line 2: there is no file'),
    ],
)
def test_wrong_lines_are_refused_before_anything_is_written(tmp_path, config, run_tool, capfd, line, message):
    lists = tmp_path / 'train.txt'
    lists.write_text(f'train1.mp4 1\n{line}\n')
    with pytest.raises(SystemExit) as exit_info:
        run_tool('train', config, '--work-dir', tmp_path / 'run', '--cfg-options',
                 f'train_dataloader.dataset.ann_file={lists}')  # fmt: skip
    assert exit_info.value.code == 2
    error = capfd.readouterr().err
    assert message in error and str(lists) in error
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('broken', ['noise', 'short'])
def test_a_broken_clip_ends_training_with_its_name(tmp_path, config, run_tool, capfd, broken):
    video = tmp_path / 'bad.mp4'
    if broken == 'noise':
        video.write_bytes(b'no video' * 100)
    else:
        write_clip(video, np.zeros((5, 32, 40, 3), np.uint8))
    lists = tmp_path / 'train.txt'
    lists.write_text(f'train1.mp4 1\n{video} 0\n')
    with pytest.raises(SystemExit):
        run_tool('train', config, '--work-dir', tmp_path / 'run', '--cfg-options',
                 f'train_dataloader.dataset.ann_file={lists}')  # fmt: skip
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('error: ') and 'bad.mp4' in error
    assert ('at least 8 frames' in error) == (broken == 'short')
