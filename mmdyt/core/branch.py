"""A frozen residual branch, dispatched: the seam between Dynamic Tuning and any Vision Transformer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from .attention import Layout
from .dispatcher import Dispatch
from .executors import EXECUTORS, Branch, read_prefix

INFERENCE = ('packed', 'masked')
TRAINING = ('masked', 'split', 'masked_all_keys')


class DynamicBranch(nn.Module):
    """Adapter on every token, heavy branch on the active ones; owns nothing of the ViT.

    Source: Dynamic Tuning (arXiv 2403.11808), eqs. (2) and (6). The adapter and the dispatcher read the raw input of
    the residual branch, before its norm.  # paper silent: pre- or post-norm input; as in the official code.

    Args:
        adapter: Maps (B, N, C) to its update (B, N, C); None adds nothing.
        dispatcher: Maps (B, N, C) to a :class:`~mmdyt.core.dispatcher.Dispatch`; None dispatches nothing: every token
            runs the branch, which with an adapter is the plain parallel adapter (AdaptFormer).
        inference: Executor of inference, ``'packed'`` (skips) or ``'masked'`` (computes all, for comparison).
        training: Executor of training, ``'masked'``; ``'split'``, the same gradients for less, for a branch that
            treats each token on its own; or ``'masked_all_keys'``, eq. (5) taken literally, with which training and
            inference of attention compute different functions.
        substitute: Maps (B, N, C) to what inactive tokens get instead of the branch's update, (B, N, C) or (C,);
            None is nothing, as in the paper.

    In eval with gradients enabled (saliency maps) the masked executor is used: packed writes in place.

    Shape:
        x (B, N, C) -> (B, N, C).

    Raises:
        ValueError: If an executor is unknown.
    """

    def __init__(
        self,
        adapter: nn.Module | None,
        dispatcher: nn.Module | None,
        inference: str = 'packed',
        training: str = 'masked',
        substitute: nn.Module | None = None,
    ):
        super().__init__()
        if inference not in INFERENCE:
            raise ValueError(f'inference must be one of {list(INFERENCE)}, got {inference!r}.')
        if training not in TRAINING:
            raise ValueError(f'training must be one of {list(TRAINING)}, got {training!r}.')
        self.adapter = adapter
        self.dispatcher = dispatcher
        self.substitute = substitute
        self.inference = inference
        self.training_executor = training
        self.complete = False
        self._records: list[DispatchRecord] = []
        self._watchers: list[Callable[[Tensor], None]] = []

    def reset_parameters(self) -> None:
        """Draw adapter and dispatcher anew; substitutes become zero."""
        for part in (self.adapter, self.dispatcher, self.substitute):
            if part is not None:
                part.reset_parameters()

    def forward(self, x: Tensor, branch: Branch, read: int | None = None) -> Tensor:
        """Add the adapter's and the branch's update to the tokens.

        Args:
            x: Tokens, (B, N, C).
            branch: The frozen branch incl. its norm, without its residual connection; called with tokens and their
                :class:`~mmdyt.core.attention.Layout`.
            read: Leading tokens whose result is wanted, (B, read, C); None is all. They must be active.
        """
        out = x[:, :read]
        out = out.clone() if self.adapter is None else out + self.adapter(out)  # eq. (6): X + Adapter(X)
        if self.complete or self.dispatcher is None:
            self._record(self._all_active(x))
            update = branch(x, Layout(read=read))
            for watcher in self._watchers:
                watcher(update)
            return out + update
        dispatch = self.dispatcher(x)  # eqs. (3), (4)
        self._record(dispatch)
        if self.substitute is not None:
            out = out + (1 - dispatch.mask[:, :read]).to(out.dtype) * self.substitute(x[:, :read])
        executor = self._executor()
        if read is not None:
            return read_prefix(branch, x, out, dispatch.mask, pack=executor == 'packed')
        return EXECUTORS[executor](branch, x, out, dispatch.mask)  # eqs. (2), (5)

    def _executor(self) -> str:
        """Which executor runs now."""
        if self.training:
            return self.training_executor
        return 'masked' if torch.is_grad_enabled() else self.inference

    def _all_active(self, x: Tensor) -> Dispatch:
        """The dispatch of the complete model; takes no memory."""
        mask = x.new_ones(()).expand(*x.shape[:2], 1)
        return Dispatch(mask, None, 0 if self.dispatcher is None else self.dispatcher.num_prefix_tokens)

    def __getstate__(self) -> dict:
        """A copy (of an averaged model, say) does not write into the records of the original."""
        return super().__getstate__() | dict(_records=[], _watchers=[])

    def _record(self, dispatch: Dispatch) -> None:
        for record in self._records:
            record.add(self, dispatch)


class DispatchRecord:
    """What the dispatchers of a model decided, branch by branch, in the order in which they ran.

    Attributes:
        names: Module name of each dispatched branch, in network order, e.g. ``backbone.layers.0.dynamic.mlp``.
        dispatches: ``dispatches[name]`` lists one :class:`~mmdyt.core.dispatcher.Dispatch` per forward pass since
            the last :meth:`clear`.
    """

    def __init__(self, branches: dict[str, DynamicBranch]):
        self._name_of = {branch: name for name, branch in branches.items()}
        self.names = list(branches)
        self.dispatches: dict[str, list[Dispatch]] = {name: [] for name in branches}

    def add(self, branch: DynamicBranch, dispatch: Dispatch) -> None:
        """Append what ``branch`` decided in one forward pass."""
        self.dispatches[self._name_of[branch]].append(dispatch)

    def clear(self) -> None:
        """Forget what was recorded; long evaluations call it after each batch."""
        for passes in self.dispatches.values():
            passes.clear()

    def flat(self) -> list[Dispatch]:
        """All dispatches, network order first, then order of the forward passes."""
        return [dispatch for passes in self.dispatches.values() for dispatch in passes]


def dynamic_branches(model: nn.Module) -> dict[str, DynamicBranch]:
    """All branches of a model that have a dispatcher, by module name, in network order."""
    branches = {name: m for name, m in model.named_modules() if isinstance(m, DynamicBranch)}
    return {name: branch for name, branch in branches.items() if branch.dispatcher is not None}


@contextmanager
def complete_model(model: nn.Module) -> Iterator[None]:
    """Within the context every token of ``model`` runs every branch: the complete model of the paper.

    Nests, and restores the former state when an error leaves the context.
    """
    branches = list(dynamic_branches(model).values())
    before = [branch.complete for branch in branches]
    try:
        for branch in branches:
            branch.complete = True
        yield
    finally:
        for branch, complete in zip(branches, before, strict=True):
            branch.complete = complete


@contextmanager
def watch_updates(model: nn.Module, watcher: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within the context, see the updates that the dispatched branches of ``model`` give as the complete model.

    Args:
        model: Run it under :func:`complete_model`.
        watcher: Called with the module name of a branch and its update (B, N, C), or (B, read, C) where only the
            leading tokens are wanted.
    """
    branches = dynamic_branches(model)
    for name, branch in branches.items():
        branch._watchers.append(partial(watcher, name))
    try:
        yield
    finally:
        for branch in branches.values():
            branch._watchers.pop()


@contextmanager
def random_masks(model: nn.Module, rates: Mapping[str, float]) -> Iterator[None]:
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

    def replace(rate: float, module: nn.Module, args: tuple, dispatch: Dispatch) -> Dispatch:
        chance = torch.full_like(dispatch.mask, rate)
        chance[:, : dispatch.num_prefix_tokens] = 1.0
        return dispatch._replace(mask=torch.bernoulli(chance))

    branches = dynamic_branches(model)
    handles = [branches[name].dispatcher.register_forward_hook(partial(replace, rate)) for name, rate in rates.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record_dispatch(model: nn.Module) -> Iterator[DispatchRecord]:
    """Record masks and logits of every dispatched branch of ``model`` within the context.

    The only way to read a decision: backbones return what their host expects. Nests; recorded training masks keep
    their gradient.

    Yields:
        A :class:`DispatchRecord`, filled as the model runs.
    """
    branches = dynamic_branches(model)
    record = DispatchRecord(branches)
    for branch in branches.values():
        branch._records.append(record)
    try:
        yield record
    finally:
        for branch in branches.values():
            branch._records.remove(record)
