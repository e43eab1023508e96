"""A threshold parts logits where a share of them is above it."""

import pytest
import torch

from mmdyt.core.fit.calibrate import threshold_for


@pytest.mark.parametrize('number', [1, 7, 1000])
@pytest.mark.parametrize('share', [0.0, 0.001, 0.3, 0.5, 0.9, 1.0])
def test_a_threshold_parts_distinct_logits_at_the_nearest_one(number, share):
    logits = torch.randn(number, generator=torch.Generator().manual_seed(0))
    threshold = threshold_for(logits, share)
    assert (logits > threshold).sum().item() == round(share * number)
    if 0 < round(share * number) < number:
        above, below = logits[logits > threshold].min(), logits[logits <= threshold].max()
        assert threshold == pytest.approx((above + below).item() / 2, abs=1e-7)


def test_floats_with_nothing_between_them_are_parted():
    low = torch.tensor(1.0)
    for _ in range(3):
        high = torch.nextafter(low, torch.tensor(2.0))
        logits = torch.stack([high, low])
        assert (logits > threshold_for(logits, 0.5)).tolist() == [True, False]
        low = high


@pytest.mark.parametrize(
    ('logits', 'share', 'active'),
    [
        ([2.0] * 4, 0.3, 0),
        ([2.0] * 4, 0.5, 0),  # as near: none
        ([2.0] * 4, 0.7, 4),
        ([3.0, 2.0, 2.0, 2.0, 1.0], 0.4, 1),  # after 3, not amid the 2s
        ([3.0, 2.0, 2.0, 2.0, 1.0], 0.6, 4),
        ([3.0, 2.0, 2.0, 2.0, 1.0], 0.8, 4),
        ([3.0, 1.0, 1.0], 0.67, 1),
        ([0.0, -0.0], 0.5, 0),
    ],
)
def test_equal_logits_are_not_parted(logits, share, active):
    logits = torch.tensor(logits)
    assert (logits > threshold_for(logits, share)).sum().item() == active
