"""A request for a calibration validates itself, once."""

import dataclasses
import math

import pytest

from mmdyt.core.fit.request import CalibrationRequest, check_batches


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(rule='best'), r"rule must be one of \['rate_matched', 'uniform', 'global'\], got 'best'"),
        (dict(target_rate=0), r'target_rate must lie in \(0, 1\], got 0. Rates are fractions'),
        (dict(target_rate=50), r'target_rate must lie in \(0, 1\], got 50. Rates are fractions'),
        (dict(target_rate=math.nan), r'target_rate must lie in \(0, 1\], got nan'),
        (dict(target_rate='half'), r"target_rate must lie in \(0, 1\], got 'half'"),
        (dict(per_image='yes'), "per_image must be True or False, got 'yes'"),
        (dict(num_batches=0), r'num_batches must be at least 1, got 0\.'),
        (dict(num_batches=2.0), r'num_batches must be at least 1, got 2\.0\.'),
        (dict(target_gmacs=0), 'target_gmacs must be a positive number, got 0'),
        (dict(target_gmacs=math.inf), 'target_gmacs must be a positive number, got inf'),
        (
            dict(target_rate=0.5, target_gmacs=3.0),
            'target_rate must not be given with target_gmacs, got 0.5 and 3.0',
        ),
    ],
)
def test_mistakes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f'^{message}'):
        CalibrationRequest(**arguments)


def test_by_default_it_is_the_rate_of_the_rate_loss_divided_as_training_did():
    assert CalibrationRequest() == CalibrationRequest(None, 'rate_matched', False, 8, None)


def test_it_cannot_be_changed_and_a_changed_copy_is_checked_again():
    request = CalibrationRequest(0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.target_rate = 0.3
    assert dataclasses.replace(request, target_rate=0.3).target_rate == 0.3
    with pytest.raises(ValueError, match='target_rate must lie in'):
        dataclasses.replace(request, target_rate=3)


def test_numbers_of_batches_are_checked_alone_too():
    check_batches(1)
    with pytest.raises(ValueError, match='num_batches must be at least 1, got None'):
        check_batches(None)
