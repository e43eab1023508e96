"""The loss of features that are held to a teacher's."""

import pytest
import torch

from mmdyt.core.teacher import feature_loss


def test_the_loss_is_relative_and_the_mean_over_levels():
    teacher = [torch.full((2, 3), 2.0), torch.full((2, 4, 5, 5), 10.0)]
    student = [torch.full((2, 3), 1.0), torch.full((2, 4, 5, 5), 10.0)]
    assert feature_loss(student, teacher).item() == pytest.approx((0.25 + 0) / 2)
    assert feature_loss([s.bfloat16() for s in student], teacher).dtype == torch.float32


def test_weights_say_where_the_distance_counts():
    teacher = [torch.full((1, 2, 1, 2), 2.0)]
    student = [teacher[0].clone()]
    student[0][..., 0] = 1.0  # half of the cells are off by half of their norm
    weights = [torch.tensor([1.5, 0.5]).view(1, 1, 1, 2)]
    assert feature_loss(student, teacher).item() == pytest.approx(0.125)
    assert feature_loss(student, teacher, weights).item() == pytest.approx(1.5 * 0.125)
    assert torch.equal(feature_loss(student, teacher, [torch.ones(1, 1, 1, 2)]), feature_loss(student, teacher))
