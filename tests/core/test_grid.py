"""Where tokens are in the image."""

import pytest
import torch

from mmdyt.core.dispatch import Dispatch
from mmdyt.core.grid import active_share


def dispatch(*patches: int, prefix: int = 1) -> Dispatch:
    mask = torch.tensor([1.0] * prefix + [float(p) for p in patches]).reshape(1, -1, 1)
    return Dispatch(mask, None, prefix)


@pytest.mark.parametrize('prefix', [0, 1, 5])
def test_active_share_is_the_mean_over_branches_on_the_grid(prefix):
    layers = [dispatch(1, 1, 0, 0, 0, 1, prefix=prefix), dispatch(0, 1, 0, 0, 1, 1, prefix=prefix)]
    share = active_share(layers, (2, 3))
    assert share.tolist() == [[[0.5, 1.0, 0.0], [0.0, 0.5, 1.0]]]


def test_active_share_keeps_the_batch():
    mask = torch.stack([torch.zeros(7, 1), torch.ones(7, 1)])
    share = active_share([Dispatch(mask, None, 1)] * 3, (3, 2))
    assert share.shape == (2, 3, 2)
    assert share[0].sum() == 0 and share[1].sum() == 6


def test_active_share_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match='grid must have one cell for each of 4 patch tokens, got'):
        active_share([dispatch(1, 0, 1, 0)], (2, 3))
    with pytest.raises(ValueError, match='dispatches must hold at least one dispatch'):
        active_share([], (2, 3))


def test_a_branch_that_saw_no_patch_counts_as_inactive():
    seen, unseen = torch.ones(1, 5, 1), torch.ones(1, 1, 1)
    share = active_share([Dispatch(seen, None, 1), Dispatch(unseen, None, 1)], (2, 2))
    assert torch.equal(share, torch.full((1, 2, 2), 0.5))
