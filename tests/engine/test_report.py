"""The report: what is read of work dirs, and what a browser makes of the page."""

import json
import re

import cv2
import numpy as np
import pytest
from test_page import HOSTILE, browse, in_a_browser

from mmdyt.engine.report import read_runs, write_report
from mmdyt.engine.report.page import MOST_POINTS, histogram, thinned
from mmdyt.engine.report.reading import join, read_lines
from mmdyt.preflight.carried import read_values

TRAIN = [dict(lr=0.1, loss=2.0 / step, time=0.5, step=step) for step in (10, 20)]
VAL = [{'mIoU': 30.0, 'activation_rate/layer_0': 1.0, 'activation_rate/layer_1': 0.25, 'gmacs': 3.0, 'step': 20}]


def write_run(folder, log='20260101_000000', rows=(*TRAIN, *VAL), tail='', costs=(1.0, 2.0, 4.0), config='a = 1\n'):
    log = folder / log
    (log / 'vis_data').mkdir(parents=True)
    (log / 'vis_data' / 'scalars.json').write_text(''.join(f'{json.dumps(row)}\n' for row in rows) + tail)
    (log / 'vis_data' / 'config.py').write_text(config)
    (log / 'costs_val.jsonl').write_text(''.join(f'{json.dumps(dict(file="x", gmacs=cost))}\n' for cost in costs))
    return folder


def read(*folders):
    return read_runs(folders, read_values)


def test_what_a_run_left_is_read(tmp_path):
    (run,) = read(write_run(tmp_path / 'one', tail='{"lr": 0.1, "lo', config="model = dict(a=[1, 2], b=dict(c='x'))\n"))
    assert run.curves['loss'] == [(10, 0.2), (20, 0.1)] and run.curves['val/mIoU'] == [(20, 30.0)]
    assert run.final['mIoU'] == 30.0 and 'loss' not in run.final
    assert (run.name, run.seconds, run.costs, run.broken) == ('one', 10.0, [1.0, 2.0, 4.0], 1)
    assert run.config == {'model.a': [1, 2], 'model.b.c': 'x'}


def test_a_resumed_run_is_one_and_a_test_is_its_own(tmp_path):
    folder = write_run(tmp_path / 'one')
    again = [dict(lr=0.1, loss=9.0, time=0.5, step=20), dict(lr=0.1, loss=8.0, time=0.5, step=30)]
    write_run(folder, '20260102_000000', again, costs=())
    write_run(folder, '20260103_000000', (), costs=())
    (folder / '20260103_000000' / '20260103_000000.json').write_text('{"mIoU": 31.5}\n')
    (run,) = read(folder)
    assert run.curves['loss'] == [(10, 0.2), (20, 9.0), (30, 8.0)] and run.seconds == 15.0
    assert (run.final['mIoU'], run.final['test/mIoU']) == (30.0, 31.5)


def test_a_comparison_gives_its_runs_and_names_tell_them_apart(tmp_path):
    for method in ('lora', 'dyt'):
        write_run(tmp_path / 'compared' / 'runs' / method)
    write_run(tmp_path / 'other' / 'dyt')
    found = read(tmp_path / 'compared', tmp_path / 'other' / 'dyt')
    assert [run.name for run in found] == ['runs/dyt', 'runs/lora', 'other/dyt']


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda folder: None, 'WORK_DIR must be a folder, got'),
        (lambda folder: folder.mkdir(), 'WORK_DIR must hold a run'),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, make, message):
    make(tmp_path / 'none')
    with pytest.raises(ValueError, match=message):
        read(tmp_path / 'none')


@pytest.mark.parametrize(
    ('text', 'rows', 'broken'),
    [
        ('', 0, 0),
        ('{"a": 1}\n\n{"a": 2}', 2, 0),
        ('{"a": 1}\n{"a"', 1, 1),
        ('[1]\nnull\n3\n', 0, 3),
        ('[' * 10**5, 0, 1),
        ('{"a": NaN}', 1, 0),
    ],
)
def test_lines_that_are_none_are_counted(tmp_path, text, rows, broken):
    (tmp_path / 'x.json').write_text(text)
    found = read_lines(tmp_path / 'x.json')
    assert (len(found[0]), found[1]) == (rows, broken)


def test_numbers_that_are_none_are_left_out():
    curves = {}
    join(curves, [dict(lr=float('nan'), loss=10**400, name='x', step=1), dict(lr=0.5, step=2)])
    assert curves == {'lr': [(2, 0.5)]}
    join(curves, [dict(lr=float('inf'), step=3), dict(lr=1, step=float('nan')), dict(lr=2, step='x', iter=4)])
    assert curves == {'lr': [(0, 1.0), (4, 2.0)]}


def test_a_config_that_is_code_is_not_run(tmp_path):
    config = f"import pathlib\npathlib.Path('{tmp_path}/ran').touch()\n"
    (run,) = read(write_run(tmp_path / 'one', config=config))
    assert run.config == {} and not (tmp_path / 'ran').exists()


def test_long_curves_are_thinned_and_equal_costs_have_a_histogram():
    points = thinned([(float(i), float(i)) for i in range(10 * MOST_POINTS)])
    assert len(points) == MOST_POINTS and points[0] == (9.0, 4.5) and points[-1][0] == 10 * MOST_POINTS - 1
    assert sum(histogram([2.0, 2.0])['counts']) == 2 and histogram([]) is None


@pytest.fixture
def page(tmp_path):
    """Of two runs that differ, one of hostile names and a picture."""
    first = write_run(tmp_path / 'one', config="a = 1\nb = '</script><b>'\nsame = 3\n")
    rows = [*TRAIN, {'mIoU': 40.0, HOSTILE.encode('ascii', 'replace').decode(): 1.0, 'step': 20}]
    second = write_run(tmp_path / 'two', rows=rows, costs=(), config="a = 2\nb = 'x'\nsame = 3\n", tail='{')
    (second / '20260101_000000' / 'vis_image').mkdir()
    cv2.imwrite(str(second / '20260101_000000' / 'vis_image' / 'p.png'), np.full((500, 900, 3), 90, np.uint8))
    write_report(read(first, second), tmp_path / 'report.html')
    return tmp_path / 'report.html'


def test_the_page_is_one_file_that_asks_for_nothing(page):
    text = page.read_text()
    own = re.sub(r'(id="data">).*?(</script>)', r'\1\2', text, flags=re.S)
    assert not re.search(r'src="(?!data:)|@import|url\(|fetch\(|/\*(STYLE|SCRIPT|DATA)', own)
    assert text.count('</script>') == 2 and '</script><b>' not in text
    assert set(re.findall(r'<input id="([\w-]+)"', text)) <= set(re.findall(r'<label for="([\w-]+)"', text))


SEE = """
const see = () => ({
  charts: [...document.querySelectorAll('#curves figcaption')].map(one => one.textContent),
  lines: document.querySelectorAll('#curves figure:first-child polyline').length,
  said: [...document.querySelectorAll('svg')].every(one => one.getAttribute('aria-label')),
  order: [...find('table').rows].slice(1).map(row => row.cells[0].textContent),
  differences: [...find('differences').rows].slice(1).map(row => [...row.cells].map(one => one.textContent)),
  pictures: [...document.querySelectorAll('#pictures img')].map(one => [one.naturalWidth, one.alt]),
  rates: document.querySelectorAll('#rates rect').length, costs: find('costs').textContent,
  broken: find('broken').textContent, wide: document.documentElement.scrollWidth > innerWidth,
});
const sort = name => [...find('table').querySelectorAll('button')].find(one => one.textContent === name).click();
"""


@in_a_browser
@pytest.mark.parametrize('width', [None, 390])
def test_a_browser_shows_it(page, width):
    found = browse(page, f'{SEE} return see();', width=width)
    assert found['charts'] == ['loss', 'lr'] and found['lines'] == 2 and found['said']
    assert found['order'] == ['one', 'two'] and found['rates'] == 2
    assert found['differences'] == [['a', '1', '2'], ['b', "'</script><b>'", "'x'"]]
    assert found['pictures'] == [[320, 'p.png, written by two']]
    assert found['costs'].startswith('one3 images: min 1, p5 1.1, median 2')
    assert found['broken'].endswith('are left out: two: 1.') and not found['wide']


@in_a_browser
def test_curves_beyond_all_bounds_are_drawn(tmp_path):
    rows = [dict(loss=sign * 1e308, step=step) for step, sign in enumerate((1, -1, 1))]
    write_report(read(write_run(tmp_path / 'one', rows=rows)), tmp_path / 'report.html')
    assert browse(tmp_path / 'report.html', f'{SEE} return see();')['charts'] == ['loss']


@in_a_browser
def test_runs_are_hidden_sorted_and_smoothed(page):
    script = """
      const seen = [];
      sort('mIoU'); seen.push(see().order, document.activeElement.textContent);
      sort('mIoU'); seen.push(see().order);
      const said = () => find('curves').querySelector('svg').getAttribute('aria-label');
      const before = said();
      set('smoothing', 0.5); seen.push([before, said()]);
      find('run-0').click(); seen.push(see());
      return seen;
    """
    sorted_, focused, turned, smoothed, rest = browse(page, SEE + script)
    assert (sorted_, focused, turned) == (['two', 'one'], 'mIoU', ['one', 'two'])
    ends = [re.findall(r'ends at ([\d.]+)', said) for said in smoothed]
    assert ends == [['0.1', '0.1'], ['0.15', '0.15']]
    assert rest['order'] == ['two'] and rest['lines'] == 1 and rest['rates'] == 0
    assert rest['differences'] == [['a', '2'], ['b', "'x'"]]
