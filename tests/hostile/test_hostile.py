"""Bad and hard inputs of all kinds through the real tools: pytest -m slow tests/hostile."""

import importlib
from collections import Counter

import cases_config
import cases_data
import cases_files
import cases_valid
import pytest
from case import Case
from play import UNCLEAR, play

pytest_plugins = ('worlds',)
WENT = Counter()
CASES = [*cases_config.CASES, *cases_data.CASES, *cases_files.CASES, *cases_valid.CASES]


@pytest.fixture(scope='session', autouse=True)
def everything_is_imported():
    """A forked process has then nothing left to import."""
    for name in ('mmdyt.models.classifier', 'mmdyt.models.recognizer', 'mmdyt.models.segmentor', 'mmdyt.engine'):
        importlib.import_module(name)
    for name in ('mmaction.datasets', 'mmpretrain.datasets', 'mmseg.datasets', 'matplotlib.pyplot'):
        importlib.import_module(name)


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_it_goes_as_it_should(case: Case, master, tmp_path, record_property):
    (folder := tmp_path / 'world').mkdir()
    outcome, why = play(case, master, folder)
    record_property('hostile', (case.kind, outcome))
    WENT[outcome] += 1
    if outcome == UNCLEAR:
        pytest.xfail(why)  # one in twenty may be, see the last test
    assert outcome == case.expected, f'{outcome}: {why}'


@pytest.mark.slow
def test_few_refusals_are_late_or_unclear():
    if WENT.total() < 100:
        pytest.skip('too few were played in this process')
    assert WENT[UNCLEAR] < 0.05 * WENT.total(), WENT
