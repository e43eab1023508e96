"""The most informative tokens go on; the others become one. B images, N tokens incl. M patches, H heads, C width."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmdyt.core.macs import Count
from mmdyt.core.options import check_choice, is_integer, is_number
from mmdyt.core.part import TokenOp
from mmdyt.core.reduction import keep_best
from mmdyt.core.tokens import TokenState

FUSE = ('sum', 'mean', 'none')


class SparseTokens(TokenOp):
    """Token sparsification: between attention and MLP the patch tokens that the class token attends to most stay.

    A token's score is the mean over the heads of the class token's attention to it. Of M patch tokens ceil(k M) stay,
    in their order; the others become one token behind them, their sum weighted by the scores, which counts as a patch
    token from then on. Attention itself runs as ever. The same in training and inference.

    Source: Sparse-Tuning (Liu et al., arXiv 2405.14700), the rule of EViT (Liang et al., arXiv 2202.07800).
    paper silent: the order (here as before), depths other than 12 (the same fractions), a ViT without class token (the
    mean attention that a token receives), and the weighted sum (its text says average; ``fuse='mean'``).

    Args:
        dim: C.
        keep_rate: k in (0, 1]; 1 changes nothing.
        fuse: What the others become: ``'sum'``, ``'mean'`` (divided by the sum of their scores) or ``'none'``
            (nothing: they are dropped).
        num_prefix_tokens: Leading tokens of the host: with none there is no class token.

    Shape:
        (B, N, C) -> (B, N - M + ceil(k M) + 1, C).

    Raises:
        ValueError: If an argument is out of range.
    """

    word = 'sparse_tokens'
    step = 'mid'
    reads_attention = True
    reduces = True
    leaves = True

    def __init__(self, dim: int, keep_rate: float = 0.7, fuse: str = 'sum', num_prefix_tokens: int = 1):
        super().__init__()
        self.set_keep_rate(keep_rate)
        check_choice(FUSE, fuse=fuse)
        self.dim, self.fuse = dim, fuse
        self.num_prefix_tokens = num_prefix_tokens
        self.drops = fuse == 'none'

    @classmethod
    def add_to(cls, block: Any, at: Sequence[float] = (0.25, 0.5, 0.75), **options) -> None:
        """Attach one to the blocks at some depths: fractions of the network's depth below 1, or indices of blocks.

        Raises:
            ValueError: If a depth is none.
        """
        depth = block.place.depth
        if not isinstance(at, Sequence) or isinstance(at, str):
            raise ValueError(f'at must be a list of fractions or indices, got {at!r}.')
        for one in at:
            if not ((is_integer(one) and 0 <= one < depth) or (is_number(one) and 0 <= one < 1)):
                raise ValueError(f'at must hold fractions in [0, 1) or indices below {depth}, got {one!r}.')
        if block.place.index in {one if is_integer(one) else int(one * depth) for one in at}:
            cls(block.place.dim, num_prefix_tokens=block.place.prefix, **options).attach(block)

    def set_keep_rate(self, keep_rate: float) -> None:
        """Set the share of the patch tokens that stay, in (0, 1]; training may run with another for a while."""
        if not (is_number(keep_rate) and 0 < keep_rate <= 1):
            raise ValueError(f'keep_rate must lie in (0, 1], got {keep_rate!r}. It is a fraction, not percent.')
        self.keep_rate = self.wanted_rate = keep_rate

    def forward(self, x: Tensor, state: TokenState) -> Tensor:
        """Keep the best tokens."""
        patches = x.shape[1] - state.first
        if self._kept(patches) >= patches:
            return x
        plan = keep_best(self.scores(x, state), self._kept(patches), self.fuse, state.padding)
        return state.reduce(x, plan)

    def scores(self, x: Tensor, state: TokenState) -> Tensor:
        """Attention (B, M) to each patch token, of the class token, or without one the mean of what it receives."""
        query, bias = state.queries_of_present(1 if state.prefix else None), state.key_bias()
        logits = (query * query.shape[-1] ** -0.5) @ state.keys_of_present().transpose(-2, -1)  # (B, H, 1 or N, N)
        logits = logits if bias is None else logits + bias.to(logits.dtype)
        return logits.float().softmax(dim=-1).mean(dim=(1, 2))[:, state.first :]

    def _kept(self, patches: int) -> int:
        """ceil(k M), but for rounding errors of the product."""
        return math.ceil(round(self.keep_rate * patches, 6))

    def patches_after(self, patches: int, prefix: int) -> int:
        """What stays, and what the others become."""
        kept = self._kept(patches)
        return patches if kept >= patches else kept + (self.fuse != 'none')

    def macs(self, tokens: Count, prefix: int, carried: int = 0) -> Count:
        """Scores, and weighted sums."""
        patches, queries = tokens - prefix, 1 if self.num_prefix_tokens else tokens
        return self.some_leave(patches) * queries * tokens * self.dim + self.sum_macs(patches, carried)

    def some_leave(self, patches: Count) -> Count:
        """Whether any of them does not stay."""
        return (1 - self.keep_rate) * patches >= 1 - 1e-6

    def sum_macs(self, patches: Count, carried: int) -> Count:
        """Multiply-adds of the weighted sums."""
        return self.some_leave(patches) * (self.fuse != 'none') * (1 + carried) * patches * self.dim

    def extra_repr(self) -> str:
        """Show the options in ``print(model)``."""
        return f'keep_rate={self.keep_rate}, fuse={self.fuse!r}'
