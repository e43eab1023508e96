"""Rows that run along on a CPU, so that their number is a round one."""

import pytest
import torch
from test_keys import BATCH, CAPACITY, DIM, TOKENS, VARIANTS, best, build, by_hand, ragged, run

from mmdyt.core import executors


@pytest.mark.parametrize('active', [*CAPACITY, 'ragged'])
@pytest.mark.parametrize(('dispatch', 'keys'), VARIANTS)
def test_surplus_rows_are_never_written(monkeypatch, dispatch, keys, active):
    asked = []
    monkeypatch.setattr(executors, 'surplus_rows', lambda number, x: asked.append(number) or 3)
    layer, x = build(dispatch, keys, inference='packed'), torch.randn(BATCH, TOKENS, DIM).double()
    found = {site: ragged() if active == 'ragged' else best(CAPACITY[active], i) for i, site in enumerate(layer.sites)}
    with torch.no_grad():
        out, _ = run(layer, x, found)
        torch.testing.assert_close(out, by_hand(layer, x, found), rtol=0, atol=1e-12)
    assert asked == [int(found[site].mask.sum()) for site in layer.sites]


def test_halves_on_a_cpu_run_round_numbers_of_rows():
    numbers = (1, 197, 255, 256, 257, 788, 1576, 1577)
    halves, floats = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
    expected = [0, 0, 0, 0, 15, 12, 24, 23]
    assert [executors.surplus_rows(number, halves) for number in numbers] == expected
    assert [executors.surplus_rows(number, floats) for number in numbers] == 8 * [0]
    with torch.autocast('cpu'):
        assert [executors.surplus_rows(number, floats) for number in numbers] == expected
