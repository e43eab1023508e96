"""Tables and pictures of several methods."""

import csv
import io
import math

import pytest

from mmdyt.engine.comparison import Trials, choose_metric, rows, stored, to_csv, to_markdown
from mmdyt.engine.comparison_plot import PANELS, plot
from mmdyt.engine.runs import Outcome, write_json


def done(value, name='accuracy/top1', **metrics):
    return Outcome('done', {name: value} | metrics, seconds=1.0)


@pytest.fixture
def trials():
    lora = {0: done(70.0, gmacs=1.3, gmacs_dense=1.2), 1: done(73.0, gmacs=1.3), 2: Outcome('diverged', {'gmacs': 1.3})}
    dyt = {0: done(72.5, gmacs=1.0, activation_rate=0.5), 1: done(73.5, gmacs=1.2, activation_rate=0.7)}
    linear = {0: done(60.0, gmacs_dense=1.25), 1: Outcome('failed', {}, 'out of memory')}
    return [
        Trials('lora,rank=4', 40_000, 19_300, lora, 1.25),
        Trials('dyt', 320_000, 19_300, dyt, 2.2),
        Trials('linear', 0, 19_300, linear),
        Trials('full', 5_500_000, 19_300),
    ]


def test_means_are_over_what_is_finite(trials):
    lora, dyt, linear, full = rows(trials, 'accuracy/top1')
    assert (lora['mean'], lora['seeds'], lora['diverged'], lora['failed']) == (71.5, 2, 1, 0)
    assert lora['std'] == pytest.approx(math.sqrt(4.5)) and (lora['low'], lora['high']) == (70, 73)
    assert (dyt['gmacs'], dyt['rate'], dyt['step_time']) == (pytest.approx(1.1), pytest.approx(0.6), 2.2)
    assert (linear['mean'], linear['std'], linear['seeds'], linear['failed']) == (60, None, 1, 1)
    assert (linear['gmacs'], linear['rate'], linear['tuned'], linear['head']) == (1.25, None, 0, 0.0193)
    assert full['mean'] is None and full['seeds'] == 0


def test_table_for_people(trials):
    lines = to_markdown(rows(trials, 'accuracy/top1'), 'accuracy/top1').splitlines()
    assert lines[0] == '| method | accuracy/top1 % | seeds | tuned M | head M | GMACs | rate | step time |'
    assert lines[2:] == [
        '| lora,rank=4 | 71.50 ± 2.12 | 2, 1 diverged | 0.040 | 0.019 | 1.300 | - | 1.25 |',
        '| dyt | 73.00 ± 0.71 | 2 | 0.320 | 0.019 | 1.100 | 0.600 | 2.20 |',
        '| linear | 60.00 | 1, 1 failed | 0.000 | 0.019 | 1.250 | - | - |',
        '| full | - | 0 | 5.500 | 0.019 | - | - | - |',
    ]


def test_table_for_programs(trials):
    table = rows(trials, 'accuracy/top1')
    read = list(csv.DictReader(io.StringIO(to_csv(table, 'accuracy/top1'))))
    assert [row['method'] for row in read] == ['lora,rank=4', 'dyt', 'linear', 'full']
    assert float(read[0]['std']) == table[0]['std'] and read[2]['std'] == '' == read[3]['mean']
    assert {row['metric'] for row in read} == {'accuracy/top1'}


def test_fractions_become_percent():
    (row,) = rows([Trials('dyt', 1, 1, {0: done(0.25, 'acc/top1')})], 'acc/top1')
    assert row['mean'] == 25


@pytest.mark.parametrize(
    ('metrics', 'expected'),
    [
        ([{'accuracy/top1': 1.0, 'gmacs': 1.0}], 'accuracy/top1'),
        ([{'aAcc': 1.0, 'mIoU': 1.0, 'mAcc': 1.0}], 'mIoU'),
        ([{'acc/top1': 1.0, 'acc/mean1': 1.0}], 'acc/top1'),
        ([{'gmacs': 1.0, 'activation_rate': 0.5, 'data_time': 1.0, 'single-label/recall': 1.0}], 'single-label/recall'),
        ([{'mIoU': 1.0, 'aAcc': 1.0}, {'aAcc': 1.0}], 'aAcc'),
        ([{'gmacs': 1.0}], None),
        ([], None),
    ],
)
def test_metric_is_what_all_logs_have(metrics, expected):
    runs = {seed: Outcome('done', found, seconds=1.0) for seed, found in enumerate(metrics)}
    assert choose_metric([Trials('a', 0, 0, runs), Trials('b', 0, 0, {0: Outcome('failed', {})})]) == expected


def test_nothing_is_a_table_too(tmp_path):
    assert choose_metric([]) is None and to_csv([], None).startswith('method,mean')
    assert len(to_markdown([], None).splitlines()) == 2
    plot([], None, tmp_path / 'x.png')
    assert (tmp_path / 'x.png').stat().st_size


def test_picture_is_written(tmp_path, trials):
    import cv2

    plot(rows(trials, 'accuracy/top1'), 'accuracy/top1', tmp_path / 'x.png')
    picture = cv2.imread(str(tmp_path / 'x.png'))
    assert picture.shape[1] > 2 * picture.shape[0] * 0.9 and picture.std() > 5
    assert [path.name for path in tmp_path.iterdir()] == ['x.png']


def test_labels_stand_apart(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, 'savefig', lambda self, file, **options: (figures.append(self), file.touch()))
    crowd = [
        dict(method=f'method_{i}', mean=70 + 0.3 * i, low=69, high=73, gmacs=1.26, tuned=0.05 * i) for i in range(8)
    ]
    plot(crowd, 'mIoU', tmp_path / 'x.png')
    (figure,) = figures
    assert len(figure.axes) == len(PANELS)
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert [text.get_text() for text in axes.texts] == [row['method'] for row in crowd]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_stored_results_are_read_and_others_passed_over(tmp_path):
    good = dict(
        format=1, marks={}, metrics={}, state='done', seconds=1, about=dict(method='a', seed=0, counts=dict(a=1))
    )
    write = dict(good=good, foreign=dict(a=1), vtab=good | dict(about={}), seedless=good | dict(about=dict(method='a')))
    for name, content in write.items():
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / 'result.json', content)
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'result.json').write_text('{')
    assert stored(tmp_path) == {tmp_path / 'good' / 'result.json': good}
