"""The loss of features that are held to a teacher's."""

import pytest
import torch

from mmdyt.core.teacher import feature_loss


def test_the_loss_is_relative_and_the_mean_over_levels():
    teacher = [torch.full((2, 3), 2.0), torch.full((2, 4, 5, 5), 10.0)]
    student = [torch.full((2, 3), 1.0), torch.full((2, 4, 5, 5), 10.0)]
    assert feature_loss(student, teacher).item() == pytest.approx((0.25 + 0) / 2)
    assert feature_loss([s.bfloat16() for s in student], teacher).dtype == torch.float32
