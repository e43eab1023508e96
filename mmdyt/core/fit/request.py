"""What a user may ask a calibration for."""

from dataclasses import dataclass

from ..losses import check_rate
from ..options import check_choice, check_switches, is_integer, is_number

RULES = ('rate_matched', 'uniform', 'global')


@dataclass(frozen=True)
class CalibrationRequest:
    """A wanted rate or cost, and how it is divided.

    Attributes:
        target_rate: Wanted activation rate, in (0, 1]; None is that of the model's rate loss, or leaves it to
            ``target_gmacs``.
        rule: How the rate is divided among the branches, see :func:`mmdyt.core.fit.calibrate.calibrate`.
        per_image: Give every image the same rate, whatever it shows.
        num_batches: How many batches of training images decide, >= 1.
        target_gmacs: Wanted cost of an image or clip instead of a rate, neck and head included, in 1e9 multiply-adds.

    Raises:
        ValueError: If a value is out of range, or both a rate and a cost are wanted.
    """

    target_rate: float | None = None
    rule: str = RULES[0]
    per_image: bool = False
    num_batches: int = 8
    target_gmacs: float | None = None

    def __post_init__(self):
        check_choice(RULES, rule=self.rule)
        if self.target_rate is not None:
            check_rate(self.target_rate)
        check_switches(per_image=self.per_image)
        check_batches(self.num_batches)
        if self.target_gmacs is None:
            return
        if self.target_rate is not None:
            raise ValueError(
                f'target_rate must not be given with target_gmacs, got {self.target_rate} and {self.target_gmacs}.'
            )
        if not (is_number(self.target_gmacs) and self.target_gmacs > 0):
            raise ValueError(f'target_gmacs must be a positive number, got {self.target_gmacs!r}.')


def check_batches(num_batches: int) -> None:
    """Refuse a number of batches that is none.

    Raises:
        ValueError: If it is out of range.
    """
    if not (is_integer(num_batches) and num_batches >= 1):
        raise ValueError(f'num_batches must be at least 1, got {num_batches!r}.')
