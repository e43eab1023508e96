"""A residual branch of a frozen network with parts beside it. B images, N tokens, C width."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from .attention import Layout, check_tracing, exporting
from .context import RECORDS, RULES, WATCHERS, asked_of
from .dispatch import Dispatch, EveryToken, with_broken_tokens, without_padding
from .executors import EXECUTORS, KEYS, SKIPPING, Branch, choose, read_prefix
from .macs import Count
from .options import check_choice
from .part import PLACES, Delta, Dispatcher, Part
from .part import parts as parts_of
from .tokens import TokenState

INFERENCE = ('auto', 'packed', 'fixed', 'masked')
TRAINING = ('masked', 'split', 'active_only', 'masked_all_keys')

# changes a decision from outside: (dispatcher, tokens, state) -> what is decided instead
Rule = Callable[[Dispatcher, Tensor, TokenState], Dispatch]


class NothingSkippedWarning(UserWarning):
    """Gradients are enabled in inference, so every token ran every branch.

    Whoever wants these gradients silences it: ``warnings.simplefilter('ignore', NothingSkippedWarning)``.
    """


def run_all(dispatcher: Dispatcher, x: Tensor, state: TokenState) -> Dispatch:
    """The rule of the complete model: every token runs; the dispatcher is not asked."""
    return EveryToken(x, dispatcher.num_prefix_tokens + state.prompts)


class BranchRun(NamedTuple):
    """What a branch ran in one pass, per image: numbers, or tensors (B,) where images differ.

    Attributes:
        tokens: Tokens that reached the branch, and that the parts beside it ran on.
        patches: Patch tokens that the dispatcher was asked about.
        queries: Tokens whose update was computed: queries of attention, rows of an MLP.
        keys: Tokens that were attended to.
        executor: How the branch ran.
        padding: Patch tokens that lie wholly in padding, which are in none of these.
        prefix: Leading tokens that are no patches.
        before: Tokens before each operation that acted in the block so far, since its attention.
        cells: Cells without a token of their own that the deltas ran on.
        beside: Tokens that the parts beside the branch ran on, where these are not all; None is all.
    """

    tokens: Count
    patches: Count
    queries: Count
    keys: Count
    executor: str = 'masked'
    padding: Count = 0
    prefix: int = 0
    before: tuple[Count, ...] = ()
    cells: Count = 0
    beside: Count | None = None


class DynamicBranch(nn.Module):
    """Deltas on every token, heavy branch on the active ones; owns nothing of the ViT.

    Source: Dynamic Tuning (arXiv 2403.11808), eqs. (2) and (6). Parallel deltas and the dispatcher read the raw input
    of the residual branch, before its norm.  # paper silent: pre- or post-norm input; as in the official code.

    Args:
        *parts: Deltas and at most one dispatcher; None is left out. Without a dispatcher every token runs the branch,
            which with an adapter is the plain parallel adapter (AdaptFormer).
        inference: Executor of inference: ``'auto'``, ``'fixed'`` where the dispatcher has a capacity and ``'packed'``
            where it has a threshold; one of these by name; or ``'masked'`` (computes all, for comparison).
        training: Executor of training: ``'masked'``; ``'split'``, the same gradients for less, for a branch that
            treats each token on its own or attends to all; ``'active_only'``, cheaper still, without the gradient of
            the mask; or ``'masked_all_keys'``, all tokens attended to in training whatever ``keys`` says.
        keys: Which tokens the active ones may attend to, in training and inference alike: the ``'active'`` ones, the
            paper's, or ``'all'``, eq. (5) taken literally: inactive tokens stay as context, and cost a key and a value
            each. Nothing to a branch that treats each token on its own.

    In eval with gradients enabled (saliency maps) the masked executor is used: the others write in place. The backbone
    then says once that nothing was skipped, by a :class:`NothingSkippedWarning`.

    Shape:
        x (B, N, C) -> (B, N, C).

    Raises:
        ValueError: If an executor is unknown, or a part has no place here.
    """

    def __init__(self, *parts: Part | None, inference: str = 'auto', training: str = 'masked', keys: str = 'active'):
        super().__init__()
        check_choice(INFERENCE, inference=inference)
        check_choice(TRAINING, training=training)
        check_choice(KEYS, keys=keys)
        self.dispatcher: Dispatcher | None = None
        self.inference = inference
        self.training_executor = training
        self.keys = keys
        self.break_even: float | None = None
        self._words: dict[str, list[str]] = {place: [] for place in PLACES}
        for part in parts:
            if part is not None:
                self.add(part)

    def add(self, part: Part) -> None:
        """Take in a part, under its word.

        Raises:
            ValueError: If the place is taken, or it has none beside a branch.
        """
        if self._modules.get(part.word) is not None:
            raise ValueError(f'parts must have words of their own within a branch, got two named {part.word!r}.')
        if isinstance(part, Delta):
            self._words[part.place].append(part.word)
        elif not isinstance(part, Dispatcher):
            raise ValueError(f'parts of a branch must be deltas or a dispatcher, got a {type(part).__name__}.')
        setattr(self, part.word, part)

    def deltas(self, place: str | None = None) -> list[Delta]:
        """The deltas at a place, or all."""
        places = PLACES if place is None else (place,)
        return [getattr(self, word) for at in places for word in self._words[at]]

    def learns(self) -> bool:
        """Whether training asks the dispatcher now."""
        if self.dispatcher is None or self.complete:
            return False
        return any(parameter.requires_grad for parameter in self.dispatcher.parameters())

    def _learns_now(self) -> bool:
        """Whether this pass is one that the dispatcher learns from."""
        return self.training and self.learns()

    @property
    def complete(self) -> bool:
        """Whether every token runs the branch, whatever its dispatcher would say."""
        rules = asked_of(RULES, self)
        return bool(rules) and rules[-1] is run_all

    @property
    def stops(self) -> bool:
        """Whether the deltas run for active tokens only, as the branch does."""
        return self.dispatcher is not None and self.dispatcher.stops

    def reset_parameters(self) -> None:
        """Draw the start values of all parts anew."""
        for part in parts_of(self):
            part.reset_parameters()

    def forward(self, x: Tensor, branch: Branch, state: TokenState | None = None) -> Tensor:
        """Add the updates of the deltas and of the branch to the tokens.

        Args:
            x: Tokens, (B, N, C).
            branch: The frozen branch incl. its norm, without its residual connection; called with tokens and their
                :class:`~mmdyt.core.attention.Layout`.
            state: Of this pass. With ``read`` the result is (B, read, C); these tokens must be active.
        """
        state = TokenState() if state is None else state
        out = x[:, : state.read]
        if self.stops:
            return self._run(x, out, self._with_deltas(branch, state), state)
        for delta in self.deltas('parallel'):
            out = delta.add_update(out, x[:, : state.read], state)  # eq. (6): X + Adapter(X)
        out = self._run(x, out, branch, state)
        for delta in self.deltas('serial'):
            out = delta.add_update(out, out, state)
        return out

    def adapt_left(self, state: TokenState) -> None:
        """Cells whose token left go on through the deltas alone, as inactive tokens do, where the state wants that."""
        if not isinstance(state.cells, int) or state.cells:
            left = state.left
            for delta in self.deltas('parallel'):
                left = left + delta.alone(state.left, state)
            for delta in self.deltas('serial'):
                left = left + delta.alone(left, state)
            state.left = torch.where(state.live.unsqueeze(-1), state.left, left)

    def _with_deltas(self, branch: Branch, state: TokenState) -> Branch:
        """The branch and the parts beside it as one branch, so that inactive tokens stay as they are."""

        def whole(x: Tensor, layout: Layout) -> Tensor:
            update, x = branch(x, layout), layout.queries(x)
            for delta in self.deltas('parallel'):
                update = update + delta(x, state)
            for delta in self.deltas('serial'):
                update = update + delta(x + update, state)
            return update

        return whole

    def _run(self, x: Tensor, out: Tensor, branch: Branch, state: TokenState) -> Tensor:
        """Add the update of the branch for the tokens that run it, and what the others get instead."""
        read = state.read
        dispatch = self._decide(x, state)  # eqs. (3), (4)
        executor = self._executor(dispatch, state)
        self._record(x, dispatch, executor, state)
        if dispatch.complete:
            update = branch(x, Layout(read=read))
            for watcher in asked_of(WATCHERS, self):
                watcher(update)
            return out + update
        if self.stops or not (self._words['parallel'] or self._words['inactive']):
            out = out.clone()  # executors of inference write into it
        for delta in self.deltas('inactive'):
            update = delta(x[:, :read], state)
            if update.dim() == 1:  # for inactive tokens is for all tokens, of which the branch gives that much less
                out, branch = out + update, _less(branch, update)
            else:
                out = out + (1 - dispatch.mask[:, :read]).to(out.dtype) * update
        if read is not None:
            return read_prefix(branch, x, out, dispatch, self.keys, executor)
        return EXECUTORS[executor](branch, x, out, dispatch, self.keys)  # eqs. (2), (5)

    def _decide(self, x: Tensor, state: TokenState) -> Dispatch:
        """What the dispatcher, or a rule from outside, decides."""
        if self.dispatcher is None or (self.keys == 'all' and state.read is not None and not self._learns_now()):
            # what is read is always active, and attends to all: there is nothing to decide about any patch token
            every = without_padding(EveryToken(x[:, : state.read], state.first), state.padding)
            every.owner, every.hidden = state.owner, state.hidden
            return every
        if self.dispatcher.decider is not self.dispatcher:  # decided below, rules and all
            return self.dispatcher(x, state)
        rules = asked_of(RULES, self)
        decided = rules[-1](self.dispatcher, x, state) if rules else self.dispatcher(x, state)
        found = without_padding(with_broken_tokens(decided, x), state.padding)
        found.owner, found.hidden = state.owner, state.hidden
        state.decided[self.dispatcher.key] = found
        return found

    def _executor(self, dispatch: Dispatch, state: TokenState) -> str:
        """Which executor runs now; tells the state where it skips nothing that could be skipped."""
        if dispatch.complete:
            return 'masked'
        if self.training:
            return self.training_executor
        if torch.is_grad_enabled():
            state.unskipped |= self.inference != 'masked' and not dispatch.learnt
            return 'masked'
        if exporting() and self.inference != 'masked' and dispatch.active is None:
            check_tracing()  # while an MLP may be traced packed
        executor = choose(self.inference, dispatch, self.break_even)
        state.dense |= executor == 'masked' != self.inference
        return executor

    def _replicate_for_data_parallel(self) -> 'DynamicBranch':
        """Not within a context: the threads of ``nn.DataParallel`` do not copy that of the one that starts them."""
        if any(asked_of(what, self) for what in (RULES, RECORDS, WATCHERS)):
            raise RuntimeError(
                'model must not be replicated within complete_model, record_dispatch and the like, got '
                'nn.DataParallel. Take DistributedDataParallel, or one device.'
            )
        return super()._replicate_for_data_parallel()

    def _record(self, x: Tensor, dispatch: Dispatch, executor: str, state: TokenState) -> None:
        records = asked_of(RECORDS, self)
        if not records:
            return
        read, all_keys = state.read, self.keys == 'all'
        tokens = state.counted(x)
        # for a mask that is learnt, split runs the inactive tokens too, without gradients
        skips = executor in (*SKIPPING, 'active_only') or (executor == 'split' and not dispatch.learnt)
        ran = dispatch.mask.detach().sum(dim=(1, 2)) if skips else tokens
        asked = 0 if dispatch.complete else tokens - dispatch.num_prefix_tokens
        reaches, queries, keys = tokens, ran, tokens if all_keys else ran
        if all_keys and executor in SKIPPING and not dispatch.rows().numel():
            keys = 0  # nothing ran at all
        if read is not None:
            reaches = queries = read
        if state.rows is not None:
            queries = state.rows
        padding = x.shape[1] - tokens
        there = dict(prefix=state.first, before=state.before, cells=state.cells)
        there['beside'] = queries if self.stops else None
        run = BranchRun(reaches, asked, queries, keys, executor, padding, **there)
        for record in records:
            record.add(self, dispatch, run)


def _less(branch: Branch, update: Tensor) -> Branch:
    """The branch, whose updates are less by one vector (C,)."""
    return lambda x, layout: branch(x, layout) - update
