"""Shares of active tokens that branches have, moved to another mean."""

import math

STEPS = 40  # of a search
EDGE = 1e-3  # how near to 0 or 1 a share counts as


def moved_shares(shares: dict[str, float], mean: float) -> dict[str, float]:
    """Shares whose logits are moved alike such that they have a mean: they keep their order and stay in [0, 1].

    Args:
        shares: Of active tokens, by branch.
        mean: In (0, 1).
    """
    logits = {name: math.log(share / (1 - share)) for name, share in _inside(shares).items()}

    def at(offset: float) -> dict[str, float]:
        return {name: 1 / (1 + math.exp(-(logit + offset))) for name, logit in logits.items()}

    low, high = -40.0, 40.0
    for _ in range(2 * STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle).values()) < mean * len(shares) else (low, middle)
    return at(high)


def _inside(shares: dict[str, float]) -> dict[str, float]:
    return {name: min(max(share, EDGE), 1 - EDGE) for name, share in shares.items()}
