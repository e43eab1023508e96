"""Gates are fitted by ridge regression in closed form."""

import pytest
import torch

from mmdyt.core.fit.ridge import Moments


def test_the_regression_is_least_squares():
    """Reference: torch.linalg.lstsq on all rows at once."""
    torch.manual_seed(0)
    inputs = torch.randn(50, 3).double() + 2
    outcomes = inputs @ torch.tensor([1.0, -2.0, 0.5]).double() + 3 + 0.1 * torch.randn(50).double()
    moments = Moments(3, torch.device('cpu'))
    for rows in range(0, 50, 20):
        moments.add(inputs[rows : rows + 20], outcomes[rows : rows + 20])
    weight, bias, explained = moments.solve(1e-12)
    expected = torch.linalg.lstsq(torch.cat([inputs, torch.ones(50, 1)], 1), outcomes[:, None]).solution.flatten()
    torch.testing.assert_close(torch.cat([weight, bias[None]]), expected, rtol=0, atol=1e-6)
    residual = outcomes - inputs @ weight - bias
    assert explained == pytest.approx(1 - (residual.var(correction=0) / outcomes.var(correction=0)).item(), abs=1e-6)


def test_constant_outcomes_and_constant_inputs_are_no_error():
    moments = Moments(2, torch.device('cpu'))
    moments.add(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([4.0, 4.0]))
    weight, bias, explained = moments.solve(1e-3)
    assert weight.tolist() == [0.0, 0.0] and bias.item() == 4.0 and explained == 0.0
