"""Gradient checkpointing of blocks: what a block saves for the backward pass is computed again there.

Source: Training Deep Nets with Sublinear Memory Cost (Chen et al., arXiv 1604.06174), by torch's
``torch.utils.checkpoint``. That runs a function twice. A block also reads and writes the
:class:`~mmdyt.core.tokens.TokenState` of its pass, obeys rules from outside, and is recorded. So the second run gets
the state and the rules of the first, and nobody sees it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .context import RECORDS, RULES, WATCHERS
from .tokens import TokenState

Run = Callable[[Tensor, TokenState], Tensor]


@torch.compiler.disable  # a compiler would have to follow the state through both runs
def recomputed(run: Run, x: Tensor, state: TokenState) -> Tensor:
    """The same as ``run(x, state)``; of what it saves for its gradients only its inputs stay in memory.

    Gradients are the same, those of masks and losses that were recorded meanwhile included: their graph is that of the
    first run. Unlike in other implementations ``x`` need not ask for a gradient, so the first layers of a frozen
    network keep those of their parts. Chance draws the same numbers in both runs.

    Args:
        run: Changes nothing but ``state``.
        x: (B, N, C).
        state: As it is now; changed as ``run`` changes it.
    """
    entered, rules = _copied(state), RULES.get()
    first = [state]  # not held by the graph, whose nodes the state itself comes to hold

    def once(x: Tensor) -> Tensor:
        if first:
            return run(x, first.pop())
        with _as_then(rules):
            return run(x, _copied(entered))

    return checkpoint(once, x, use_reentrant=False)


def _copied(state: TokenState) -> TokenState:
    """What a block may change without changing the original; what lies in it is replaced, never changed."""
    return state.replaced(carried=dict(state.carried), decided=dict(state.decided))


@contextmanager
def _as_then(rules: tuple) -> Iterator[None]:
    """The rules of the first run, which may have ended since, or hold in another thread; nothing is recorded again."""
    now = [(what, what.get()) for what in (RULES, RECORDS, WATCHERS)]
    RULES.set(rules)
    RECORDS.set(())
    WATCHERS.set(())
    try:
        yield
    finally:
        for what, before in now:
            what.set(before)
