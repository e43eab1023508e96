"""Terms on their own: what may be distilled, and that the complete pass leaves no statistics behind."""

import copy

import pytest
import torch
import torch.nn as nn

from mmdyt.models.loss_terms import check_logits, kept_statistics

NORMS = [
    nn.BatchNorm2d(3),
    nn.BatchNorm2d(3, momentum=None),
    nn.BatchNorm2d(3, momentum=0.0),
    nn.BatchNorm2d(3, affine=False),
    nn.BatchNorm2d(3, track_running_stats=False),
    nn.InstanceNorm2d(3, track_running_stats=True),
    nn.InstanceNorm2d(3, track_running_stats=True, momentum=None),
]


def images(seed):
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) + seed


@pytest.mark.parametrize('norm', NORMS, ids=repr)
@pytest.mark.parametrize('training', [True, False])
def test_norms_normalise_as_ever_and_their_statistics_go_on_as_if_nothing_had_been(norm, training):
    ours, plain = copy.deepcopy(norm).train(training), copy.deepcopy(norm).train(training)
    torch.testing.assert_close(ours(images(1)), plain(images(1)))
    with kept_statistics(nn.Sequential(ours)):
        torch.testing.assert_close(ours(images(2)), copy.deepcopy(plain)(images(2)))
    torch.testing.assert_close(ours(images(3)), plain(images(3)))
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(ours.eval()(images(4)), plain.eval()(images(4)))


def test_an_image_that_overflows_does_not_reach_the_statistics():
    norm = nn.BatchNorm2d(3)
    with kept_statistics(norm):
        norm(torch.full((2, 3, 4, 4), torch.inf))
    assert norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()


def test_norms_are_as_before_after_an_error():
    model = nn.Sequential(*copy.deepcopy(NORMS))
    before = [(norm.track_running_stats, norm.momentum) for norm in model]
    with pytest.raises(ZeroDivisionError), kept_statistics(model):
        raise ZeroDivisionError
    assert [(norm.track_running_stats, norm.momentum) for norm in model] == before


@pytest.mark.parametrize('shape', [(2,), (4, 1), (4, 0), (4, 1, 8, 8), ()])
def test_logits_without_classes_are_not_distilled(shape):
    with pytest.raises(ValueError, match='^distill_weight must be 0 with logits that are not .* got 1.0 with'):
        check_logits(torch.zeros(shape), 1.0)


@pytest.mark.parametrize('logits', [None, (torch.zeros(2, 3),), dict(a=torch.zeros(2, 3))])
def test_what_is_no_tensor_is_not_distilled(logits):
    with pytest.raises(ValueError, match=f'got 1.0 with {type(logits).__name__}'):
        check_logits(logits, 1.0)


@pytest.mark.parametrize('shape', [(2, 2), (4, 3, 8, 8)])
def test_logits_of_classes_are(shape):
    check_logits(torch.zeros(shape), 1.0)
