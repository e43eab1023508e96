"""One decision for several layers: those that follow take over what the layer before them decided."""

from collections.abc import Sequence

from torch import Tensor

from mmdyt.core.dispatch import Dispatch, EveryToken
from mmdyt.core.part import Dispatcher, Part, TokenOp
from mmdyt.core.tokens import TokenState


class SameDecision(Dispatcher):
    """The decision of an earlier layer about the same branch, taken over: no gate, no cost, no gather index of its own.

    So the layers that feed one level of a decoder have one map. Whatever changes the earlier decision (a rule from
    outside, padding, tokens that are no numbers) changes this one; what is fitted or calibrated is the earlier gate,
    and every layer that follows counts.  # differs from paper: opt-in.

    Args:
        dim: Token width C; not used.
        num_prefix_tokens: P, leading tokens that are always active.

    Shape:
        (B, N, C) -> :class:`Dispatch` with a mask of (B, N, 1).
    """

    def __init__(self, dim: int, num_prefix_tokens: int = 1):
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self._before: tuple[Dispatcher, ...] = ()  # not a child: the earlier layer owns it

    def follow(self, before: Dispatcher | None) -> None:
        """Say whose decision it is.

        Raises:
            ValueError: If there is none.
        """
        if before is None:
            raise ValueError('layers must not begin with a SameDecision, which follows an earlier layer, got one.')
        self._before = (before,)

    @property
    def decider(self) -> Dispatcher:
        """The dispatcher that decides."""
        return self._before[0] if self._before else self

    def check(self, before: Sequence[Part]) -> None:
        """Refuse to follow across a part that makes tokens fewer."""
        since = before[[part is self.decider for part in before].index(True) :]
        for part in since:
            if isinstance(part, TokenOp) and part.reduces:
                raise ValueError(
                    f"decide_per must be 'layer' with a {type(part).__name__} between layers that share a decision, "
                    'got one: their tokens differ.'
                )

    def forward(self, x: Tensor, state: TokenState | None = None) -> Dispatch:
        """What was decided in this pass."""
        prefix = 0 if state is None else state.prefix + state.prompts
        if state is not None and x.shape[1] == prefix:  # no patch token is left to decide about
            return EveryToken(x, prefix)
        decided = None if state is None else state.decided.get(self.decider.key)
        if decided is None:
            raise ValueError('state must be that of a pass through the layer that decides, got none of it.')
        if decided.tokens != x.shape[1]:
            raise ValueError(f'tokens must be the {decided.tokens} that were decided about, got {x.shape[1]}.')
        return decided
