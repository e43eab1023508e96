"""Step times: turns, ratios, and the file that keeps them."""

import json
from types import SimpleNamespace

import pytest

from mmdyt.engine import step_time
from mmdyt.engine.step_time import StepTimes, device_name, ratio, take_turns


class Clockwork:
    """A step that takes what it is told to."""

    turns: list[str] = []

    def __init__(self, name, seconds):
        self.name, self.seconds, self._takes = name, [], iter(seconds)

    def run(self):
        self.turns.append(self.name)
        return next(self._takes)


def test_steps_take_turns_and_the_first_does_not_count(monkeypatch):
    monkeypatch.setattr(Clockwork, 'turns', [])
    steps = [Clockwork('a', [9.0, 1.0, 2.0]), Clockwork('b', [9.0, 3.0, 4.0])]
    take_turns(steps, 2)
    assert Clockwork.turns == ['a', 'b'] * 3
    assert [step.seconds for step in steps] == [[1, 2], [3, 4]]


def test_ratio_is_within_rounds():
    base, other = SimpleNamespace(seconds=[1.0, 10.0, 2.0]), SimpleNamespace(seconds=[2.0, 20.0, 2.0])
    assert ratio(other, base) == 2  # of medians it would be 1


@pytest.fixture
def times(tmp_path, monkeypatch):
    """Times of methods whose steps take as many seconds as their names have letters."""
    built = []

    def step(name, cfg):
        built.append(name)
        return SimpleNamespace(name=name, seconds=[], run=lambda: float(len(name)))

    monkeypatch.setattr(step_time, 'Step', step)
    marks = dict(adapter=dict(config='1', source='1'), lora=dict(config='2', source='1'))

    def make(rounds=2, same=dict.__eq__):
        return StepTimes(tmp_path / 'steps.json', 'adapter', rounds, lambda name: None, marks.__getitem__, same)

    return SimpleNamespace(make=make, marks=marks, built=built, file=tmp_path / 'steps.json')


def test_times_are_kept(times):
    assert times.make().known() == dict(adapter=dict(ratio=1.0))
    times.make().measure('lora')
    found = times.make().known()['lora']
    assert found['ratio'] == pytest.approx(4 / 7) and (found['seconds'], found['base_seconds']) == (4, 7)
    assert (found['rounds'], found['device']) == (2, device_name()) and times.built == ['lora', 'adapter']


def test_times_of_other_settings_are_not_known(times):
    times.make().measure('lora')
    assert 'lora' not in times.make(rounds=3).known()
    times.marks['adapter'] = dict(config='1', source='2')
    assert 'lora' not in times.make().known()
    assert 'lora' in times.make(same=lambda a, b: a['config'] == b['config']).known()
    del times.marks['lora']  # a method that is no more
    assert 'lora' not in times.make(same=lambda a, b: True).known()


@pytest.mark.parametrize('text', ['', '{', '[]', '[1]', '{"lora": 1}', '{"lora": {"ratio": 2}}', '"lora"'])
def test_broken_times_are_measured_anew(times, text):
    times.file.write_text(text)
    assert list(times.make().known()) == ['adapter']
    times.make().measure('lora')
    assert list(json.loads(times.file.read_text())) == ['lora']
