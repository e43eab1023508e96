"""What a network tells of a pass that ended."""

import warnings

from .branch import NothingSkippedWarning
from .tokens import TokenState


class RunsDenseWarning(UserWarning):
    """Skipping would take longer here than running all tokens, so all run."""


def tell_of(state: TokenState, told: set[type[Warning]]) -> None:
    """Warn, once of each kind, whoever called the backbone's forward: of a pass that did not skip what it could.

    Args:
        state: Of the pass that ended.
        told: The kinds that were told; changed.
    """
    kinds = {
        NothingSkippedWarning: (
            state.unskipped,
            'torch.no_grad() must be around the inference of a dispatched model, got one with gradients enabled: '
            'every token ran, none was skipped. For gradients (saliency maps) silence this by '
            "warnings.simplefilter('ignore', mmdyt.core.branch.NothingSkippedWarning).",
        ),
        RunsDenseWarning: (
            state.dense,
            'break_even must lie above the share of active tokens for any to be skipped: here skipping would take '
            'longer than running all of them, so all run, with the same result.',
        ),
    }
    for kind, (happened, message) in kinds.items():
        if happened and kind not in told:
            told.add(kind)
            warnings.warn(message, kind, stacklevel=4)  # whoever called forward
