"""From which share of active tokens on skipping does not pay."""

import pytest
import torch
from test_benchmark import builder, images_of

from mmdyt.engine.benchmark.break_even import RATES, active_share, break_even, count_break_even_rounds, crossing
from mmdyt.engine.benchmark.request import BenchmarkRequest
from mmdyt.engine.benchmark.variants import Network, with_rate


@pytest.mark.parametrize(
    ('shares', 'ratios', 'found'),
    [
        ((0.5, 1.0), (0.8, 0.9), 1.0),
        ((0.5, 1.0), (0.8, 1.2), 0.75),
        ((0.5, 0.7, 0.9), (1.1, 0.9, 1.2), 0.5),
        ((0.5, 0.7, 0.9, 1.0), (0.8, 1.0, 0.9, 1.2), 0.7),
    ],
)
def test_the_break_even_is_where_the_ratio_first_reaches_1(shares, ratios, found):
    assert crossing(shares, ratios) == pytest.approx(found)


def test_break_even_is_measured_for_each_setting():
    told = []
    request = BenchmarkRequest(batch=(1, 2), rounds=1)
    found = break_even(builder(), request, images_of('classification'), False, lambda: told.append(1))
    assert len(told) == count_break_even_rounds(request)
    assert [one['batch'] for one in found['settings']] == [1, 2]
    assert found['break_even'] == min(one['break_even'] for one in found['settings'])
    for one in found['settings']:
        assert 0 < one['break_even'] <= 1 and len(one['time_ratios']) == len(RATES)
        assert one['shares'] == pytest.approx([(1 + round(16 * rate)) / 17 for rate in RATES])
    assert builder(break_even=found['break_even'])().backbone.layers[0].dynamic.mlp.break_even == found['break_even']


def test_shares_of_active_tokens_count_the_prefix():
    network = with_rate(Network(builder()()), 0.5, 'capacity', torch.empty(0), trained=False)
    assert active_share(network, images_of('classification').pool[:2]) == pytest.approx(9 / 17)
