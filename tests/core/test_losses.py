import pytest
import torch

from mmdyt.core.dispatcher import Dispatch, straight_through
from mmdyt.core.losses import activation_rate, rate_loss


def test_rate_counts_patch_tokens_only_over_all_layers_and_images():
    first = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).float()[..., None]
    second = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).float()[..., None]
    rate = activation_rate([Dispatch(first, None, 1), Dispatch(second, None, 1)])
    assert rate.item() == pytest.approx((1 + 0 + 4 + 4) / 16)


def test_rate_loss_is_one_squared_budget_and_pulls_the_scores():
    score = torch.full((1, 4, 1), 0.9, requires_grad=True)
    loss = rate_loss(activation_rate([Dispatch(straight_through(score), None, 0)]), 0.5)
    assert loss.item() == pytest.approx(0.25)
    loss.backward()
    torch.testing.assert_close(score.grad, torch.full_like(score, 2 * 0.5 / 4))


def test_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match='dispatches must hold at least one mask'):
        activation_rate([])
