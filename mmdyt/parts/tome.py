"""Similar tokens merge. B images, N tokens incl. M patches, H heads, D head width, C width."""

from typing import Any

from torch import Tensor

from mmdyt.core.macs import Count
from mmdyt.core.options import check_choice, check_switches, is_integer
from mmdyt.core.part import TokenOp
from mmdyt.core.reduction import Merge, match_pairs
from mmdyt.core.tokens import TokenState

SCHEDULES = ('constant', 'falling')
SCOPES = dict(block='mid', mlp='around')  # what sees merged tokens, and when merging acts


class ToMe(TokenOp):
    """Token Merging: between attention and MLP the r most similar pairs of patch tokens of each block become one each.

    Tokens are alike as their keys are, averaged over the heads. A merged token is the mean of those that it stands for,
    and counts like as many in attention. No parameter, no gradient through the matching; with and without training.

    Source: Token Merging: Your ViT But Faster (Bolya et al., ICLR 2023, arXiv 2210.09461).

    Args:
        dim: C.
        pairs: Merged in this block, r >= 0; never more than half of the patch tokens.
        head_dim: D.
        scope: ``'block'``: tokens stay merged; ``'mlp'``: they merge for the MLP of this block only, whose update all
            get that a token stands for.  # differs from paper: opt-in.
        proportional: Whether attention counts a merged token for as many as it stands for: the log of its size is added
            to the scores of its key. The paper leaves it out for MAE weights without training.

    Shape:
        (B, N, C) -> (B, N - r, C).

    Raises:
        ValueError: If an argument is out of range.
    """

    word = 'tome'
    step = 'mid'
    reads_attention = True

    def __init__(self, dim: int, pairs: int = 8, head_dim: int = 64, scope: str = 'block', proportional: bool = True):
        super().__init__()
        if not (is_integer(pairs) and pairs >= 0):
            raise ValueError(f'pairs must be a number of tokens, got {pairs!r}.')
        check_switches(proportional=proportional)
        check_choice(SCOPES, scope=scope)
        self.step, self.reduces = SCOPES[scope], scope == 'block'
        self.pairs, self.head_dim, self.proportional = pairs, head_dim, proportional
        self.degree: int | None = pairs if scope == 'block' else None  # where it is that of every block

    @classmethod
    def add_to(cls, block: Any, r: int = 8, schedule: str = 'constant', **options) -> None:
        """Attach one to a block.

        Args:
            block: Of any network.
            r: Pairs that merge in each block, on average.
            schedule: ``'constant'``, or ``'falling'``: linearly from 2 r in the first block to 0 in the last.
            **options: Of the constructor.

        Raises:
            ValueError: If the schedule is unknown, or r no number of pairs.
        """
        check_choice(SCHEDULES, schedule=schedule)
        if not (is_integer(r) and r >= 0):
            raise ValueError(f'r must be a number of pairs, got {r!r}.')
        place, pairs = block.place, r
        if schedule == 'falling' and place.depth > 1:
            pairs = int(2 * r * (1 - place.index / (place.depth - 1)))
        part = cls(place.dim, pairs, head_dim=place.dim // block.num_heads, **options)
        part.degree = part.degree if schedule == 'constant' else None
        part.attach(block)

    def set_degree(self, degree: int) -> None:
        """Merge so many pairs from now on.

        Raises:
            ValueError: If it is no number of pairs, or blocks have pairs of their own.
        """
        if self.degree is None:
            raise ValueError("schedule must be 'constant', scope 'block' for a degree to be set, got another.")
        if not (is_integer(degree) and degree >= 0):
            raise ValueError(f'degree must be a number of pairs, got {degree!r}.')
        self.degree = self.pairs = degree

    def forward(self, x: Tensor, state: TokenState) -> Tensor:
        """Merge the most similar pairs."""
        plan = self.plan(x, state)
        return x if plan is None else state.reduce(x, plan)

    def plan(self, x: Tensor, state: TokenState) -> Merge | None:
        """Which tokens merge; None where none do."""
        first = state.first
        pairs = min(self.pairs, (x.shape[1] - first) // 2)
        if not pairs:
            return None
        counts = self.proportional and self.step == 'mid'
        sizes = state.count_sizes(x) if counts else x.new_ones(x.shape[0], x.shape[1] - first)
        metric = state.keys_of_present().mean(dim=1)[:, first:]
        return match_pairs(metric, pairs, sizes, first, state.padding)

    def patches_after(self, patches: int, prefix: int) -> int:
        """Fewer by the merged pairs."""
        return patches if self.step == 'around' else self.rows(patches, prefix)

    def rows(self, patches: int, prefix: int) -> int:
        """Fewer by the merged pairs."""
        return patches - min(self.pairs, max(patches, 0) // 2)

    def macs(self, tokens: Count, prefix: int, carried: int = 0) -> Count:
        """Of the matching: every token of one set with every one of the other, D each."""
        patches = tokens - prefix
        a = (patches + (prefix + 1) % 2) // 2
        return a * (patches - a) * self.head_dim * (patches > 1) * (self.pairs > 0)

    def extra_repr(self) -> str:
        """Show the options in ``print(model)``."""
        return f'pairs={self.pairs}, step={self.step!r}, proportional={self.proportional}'
