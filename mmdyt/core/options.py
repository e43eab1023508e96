"""What kind of value an option has: True is no number, and ``'off'``, which is true in Python, no switch."""

import math
from collections.abc import Collection
from numbers import Integral, Real


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_integer(value: object) -> bool:
    """Whether a value is a whole number by its type."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_choice(known: Collection[str], **options: object) -> None:
    """Refuse a word that is not one of some; of another type it is none, and need not even be hashable.

    Raises:
        ValueError: Naming it.
    """
    for name, value in options.items():
        if not (isinstance(value, str) and value in known):
            raise ValueError(f'{name} must be one of {list(known)}, got {value!r}.')


def check_switches(**options: object) -> None:
    """Refuse a switch that is neither on nor off.

    Raises:
        ValueError: Naming it.
    """
    for name, value in options.items():
        if not isinstance(value, bool):
            raise ValueError(f'{name} must be True or False, got {value!r}.')


def check_probability(**options: object) -> None:
    """Refuse what is no probability below 1.

    Raises:
        ValueError: Naming it.
    """
    for name, value in options.items():
        if not (is_number(value) and 0 <= value < 1):
            raise ValueError(f'{name} must lie in [0, 1), got {value!r}. It is a probability, not percent.')
