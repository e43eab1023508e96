"""See and change what the dispatchers of a model decide, from outside. B images, N tokens, C width.

A context holds in the thread that entered it, and in one that runs in a copy of its context
(``contextvars.copy_context().run``): other threads may use the same model, and notice nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from .branch import BranchRun, DynamicBranch, Rule, run_all
from .context import RECORDS, RULES, WATCHERS, ask, asked_of
from .dispatch import Dispatch
from .part import Dispatcher, TokenOp
from .tokens import TokenState


class DispatchRecord:
    """What the dispatchers of a model decided and what its branches ran, in the order in which they ran.

    Attributes:
        names: Module name of each mapped branch (:func:`mapped_branches`), in network order, e.g.
            ``backbone.layers.0.dynamic.mlp``.
        dispatches: ``dispatches[name]`` lists one :class:`~mmdyt.core.dispatch.Dispatch` per forward pass since
            the last :meth:`clear`.
        runs: ``runs[name]`` lists one :class:`~mmdyt.core.branch.BranchRun` per forward pass, of all branches.
    """

    def __init__(self, branches: dict[str, DynamicBranch], names: Iterable[str]):
        self._name_of = {branch: name for name, branch in branches.items()}
        self.names = list(names)
        self.dispatches: dict[str, list[Dispatch]] = {name: [] for name in self.names}
        self.runs: dict[str, list[BranchRun]] = {name: [] for name in branches}

    def add(self, branch: DynamicBranch, dispatch: Dispatch, run: BranchRun) -> None:
        """Append what ``branch`` decided and ran in one forward pass."""
        name = self._name_of[branch]
        self.runs[name].append(run)
        if name in self.dispatches:
            self.dispatches[name].append(dispatch)

    def clear(self) -> None:
        """Forget what was recorded; long evaluations call it after each batch."""
        for passes in (*self.dispatches.values(), *self.runs.values()):
            passes.clear()

    @property
    def here(self) -> bool:
        """Whether passes of this thread are recorded; hooks of a model are called in every thread."""
        return all(self in asked_of(RECORDS, branch) for branch in self._name_of)

    def of_pass(self, index: int = -1) -> dict[str, Dispatch]:
        """What each dispatched branch decided in one forward pass, by module name.

        Args:
            index: Of the pass since the last :meth:`clear`, from 0; -1 is the last one.

        Raises:
            ValueError: If there was no such pass.
        """
        for name, passes in self.dispatches.items():
            if not -len(passes) <= index < len(passes):
                raise ValueError(f'index must be that of one of {len(passes)} passes of {name}, got {index}.')
        return {name: passes[index] for name, passes in self.dispatches.items()}

    def flat(self) -> list[Dispatch]:
        """All dispatches, network order first, then order of the forward passes."""
        return [dispatch for passes in self.dispatches.values() for dispatch in passes]


def all_branches(model: nn.Module) -> dict[str, DynamicBranch]:
    """All branches of a model that have room for parts, by module name, in network order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DynamicBranch)}


def dynamic_branches(model: nn.Module) -> dict[str, DynamicBranch]:
    """All branches of a model that have a dispatcher, by module name, in network order."""
    return {name: branch for name, branch in all_branches(model).items() if branch.dispatcher is not None}


def mapped_branches(model: nn.Module) -> dict[str, DynamicBranch]:
    """All branches that some tokens run and others do not, by module name, in network order.

    Those that have a dispatcher; where none has one and parts make the tokens fewer, the MLPs.
    """
    found = dynamic_branches(model)
    if found or not reductions(model):
        return found
    return {name: branch for name, branch in all_branches(model).items() if name.endswith('.mlp')}


@contextmanager
def record_dispatch(model: nn.Module) -> Iterator[DispatchRecord]:
    """Record masks and logits of every dispatched branch of ``model``, and what ran, within the context.

    The only way to read a decision: backbones return what their host expects. Nests; recorded training masks keep
    their gradient.

    Yields:
        A :class:`DispatchRecord`, filled as the model runs.
    """
    branches = all_branches(model)
    record = DispatchRecord(branches, mapped_branches(model))
    with ask(RECORDS, dict.fromkeys(branches.values(), record)):
        yield record


@contextmanager
def unrecorded() -> Iterator[None]:
    """Within the context nothing is recorded that was asked for outside: for passes that belong to no result."""
    token = RECORDS.set(())
    try:
        yield
    finally:
        RECORDS.reset(token)


@contextmanager
def decisions(model: nn.Module, rules: Rule | Mapping[str, Rule]) -> Iterator[None]:
    """Within the context rules decide in place of the dispatchers. The one way to change a decision from outside.

    Nests, the innermost rule holds, and the former state is restored when an error leaves the context.

    Args:
        model: Its branches with a dispatcher are those that decide something.
        rules: ``rule(dispatcher, x, state)`` gives the :class:`~mmdyt.core.dispatch.Dispatch` of tokens x (B, N, C); it
            may ask the dispatcher. One for all branches, or by branch name as in :func:`dynamic_branches`; branches
            that are not named decide as before. A branch that takes over an earlier one's decision goes on doing so.

    Raises:
        KeyError: If there is no such branch.
    """
    branches = dynamic_branches(model)
    rules = rules if isinstance(rules, Mapping) else dict.fromkeys(branches, rules)
    with ask(RULES, {branches[name]: rule for name, rule in rules.items()}):
        yield


def complete_model(model: nn.Module):
    """Within the context every token of ``model`` runs every branch: the complete model of the paper."""
    return decisions(model, run_all)


def reductions(model: nn.Module) -> dict[str, TokenOp]:
    """All parts of a model that make tokens fewer, by module name, in network order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, TokenOp) and m.reduces}


def unreduced(model: nn.Module):
    """Within the context no part of ``model`` makes tokens fewer."""
    return ask(RULES, dict.fromkeys(reductions(model).values(), keep_all))


def keep_all(operation: TokenOp, x: Tensor, state: TokenState) -> Tensor:
    """The rule of :func:`unreduced`: every token goes on."""
    return x


def random_masks(model: nn.Module, rates: Mapping[str, float]):
    """Within the context the dispatchers' choice of tokens is replaced by chance, at the same activation rates.

    What a dispatcher knows about tokens is what a model loses by this. Masks are drawn anew in every pass, each patch
    token on its own.

    Args:
        model: Its dispatchers run all the same, since their cost belongs to the comparison.
        rates: Chance that a patch token is active, in [0, 1], by branch name as in :func:`dynamic_branches`. Branches
            that are not named decide as ever.

    Raises:
        KeyError: If there is no such branch.
    """
    return decisions(model, {name: partial(_at_random, rate) for name, rate in rates.items()})


def _at_random(rate: float, dispatcher: Dispatcher, x: Tensor, state: TokenState) -> Dispatch:
    """A rule: each patch token is active by chance."""
    dispatch = dispatcher(x, state)
    chance = torch.full_like(dispatch.mask, rate)
    chance[:, : dispatch.num_prefix_tokens] = 1.0
    return dispatch.with_mask(torch.bernoulli(chance))


def sampled(dispatcher: Dispatcher, x: Tensor, state: TokenState) -> Dispatch:
    """A rule: decide as in training, whatever the mode."""
    return dispatcher.sample(x, state)


@contextmanager
def watch_updates(model: nn.Module, watcher: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within the context, see the updates that the dispatched branches of ``model`` give as the complete model.

    Args:
        model: Run it under :func:`complete_model`.
        watcher: Called with the module name of a branch and its update (B, N, C), or (B, read, C) where only the
            leading tokens are wanted.
    """
    branches = dynamic_branches(model)
    with ask(WATCHERS, {branch: partial(watcher, name) for name, branch in branches.items()}):
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within the context the model runs as in inference; afterwards each module has its former mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
