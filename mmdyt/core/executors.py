"""How a branch runs on a decision. Each executor adds the branch's update of the active tokens to ``out``.

A branch maps tokens and their :class:`~mmdyt.core.attention.Layout` to an update of the tokens whose update is wanted.
A branch that mixes tokens (attention, a whole layer) attends to the active ones only, or, with ``keys='all'``, to all:
inactive tokens then stay as context. The layout says which. B images, N tokens, C width, K active tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import kernels
from .attention import DENSE, Layout, Lengths, check_tracing, exporting
from .dispatch import Dispatch

KEYS = ('active', 'all')
FEW_ROWS = 256  # of which there are so few numbers that a CPU keeps its plans for all

Branch = Callable[[Tensor, Layout], Tensor]
Executor = Callable[[Branch, Tensor, Tensor, Dispatch, str], Tensor]


def masked(branch: Branch, x: Tensor, out: Tensor, dispatch: Dispatch, keys: str = 'active') -> Tensor:
    """Run the branch on every token, and multiply by the mask, eq. (5). Saves nothing.

    Args:
        branch: The heavy branch.
        x: Its input, (B, N, C).
        out: What the update is added to, (B, N, C).
        dispatch: What was decided about ``x``.
        keys: Which tokens may be attended to, ``'active'`` or ``'all'``.

    Returns:
        (B, N, C).
    """
    layout = DENSE if keys == 'all' else _hidden(dispatch)
    return out + dispatch.mask.to(out.dtype) * branch(x, layout)  # eq. (6)


def masked_all_keys(branch: Branch, x: Tensor, out: Tensor, dispatch: Dispatch, keys: str = 'active') -> Tensor:
    """As :func:`masked`, but inactive tokens may be attended to, whatever inference does, for comparison.

    With ``keys='active'`` this trains another function than inference computes. The arguments are those of
    :func:`masked`.
    """
    return masked(branch, x, out, dispatch, keys='all')


def split(branch: Branch, x: Tensor, out: Tensor, dispatch: Dispatch, keys: str = 'active') -> Tensor:
    """As :func:`masked`, for less: no gradient flows through the branch at inactive tokens, so none is prepared.

    Their update is multiplied by 0, eq. (5): its gradient to the branch and its input is exactly zero, and only its
    value is needed, for the gradient of the dispatcher; where nothing asks for that, they do not run at all.
    Gradients are those of :func:`masked`, time and memory of the inactive tokens are saved. For branches that treat
    each token on its own (an MLP), or attend to all. The arguments are those of :func:`masked`.
    """
    if not dispatch.learnt:  # nobody asks what the inactive tokens would have gained
        return active_only(branch, x, out, dispatch, keys)
    rest = dispatch.with_mask(1 - dispatch.mask.detach())
    active, inactive = dispatch.rows(), rest.rows()
    update = _update(branch, x, dispatch, keys)
    with torch.no_grad():
        idle = _update(branch, x, rest, keys)
    order = torch.empty(len(active) + len(inactive), dtype=torch.long, device=x.device)
    order[torch.cat([active, inactive])] = torch.arange(len(order), device=order.device)
    update = torch.cat([update, idle.to(update.dtype)]).index_select(0, order)
    return out + dispatch.mask.to(out.dtype) * update.view(x.shape)  # eq. (6)


def active_only(branch: Branch, x: Tensor, out: Tensor, dispatch: Dispatch, keys: str = 'active') -> Tensor:
    """As :func:`split`, but inactive tokens never run: the mask gets no gradient, so it is inexact where one flows.

    For gates that are not trained (fitted ones), whose soft score would still send a gradient into the tokens.
    # differs from paper: opt-in. The arguments are those of :func:`masked`.
    """
    update = _update(branch, x, dispatch, keys)
    rows = out.flatten(0, 1).index_add(0, dispatch.rows(), update.to(out.dtype))  # eq. (6), active rows only
    return rows.view(x.shape)


def packed(branch: Branch, x: Tensor, out: Tensor, dispatch: Dispatch, keys: str = 'active') -> Tensor:
    """Gather the active tokens of all images into one row, run the branch on these only, scatter back.

    Images of a batch may differ in their number of active tokens. Writes into ``out`` in place, hence for inference
    only: it may be overwritten. The arguments are those of :func:`masked`.
    """
    active = dispatch.rows().shape[0]
    if active == 0:
        check_tracing()
        return out
    return _scatter(_update(branch, x, dispatch, keys, surplus_rows(active, x)), out, dispatch)


def fixed(branch: Branch, x: Tensor, out: Tensor, dispatch: Dispatch, keys: str = 'active') -> Tensor:
    """As :func:`packed`, for decisions whose number of active tokens is known before any score: equal in all images.

    No shape depends on data: nothing waits for a GPU, attention among the active tokens needs no mask, and the model
    can be exported, with any number of images: that is read as ``shape[0]``, since ``torch.export`` takes ``len`` for a
    constant. The arguments are those of :func:`masked`, ``dispatch`` a :class:`~mmdyt.core.dispatch.BestTokens`.
    """
    if dispatch.active == 0:
        return out
    if keys == 'all':
        update = branch(x, Layout(rows=dispatch.rows()))
    else:
        active = x.flatten(0, 1).index_select(0, dispatch.rows())
        update = branch(active.view(x.shape[0], dispatch.active, x.shape[2]), DENSE)
    return _scatter(update.flatten(0, 1), out, dispatch)


def read_prefix(
    branch: Branch, x: Tensor, out: Tensor, dispatch: Dispatch | None, keys: str, executor: str = 'masked'
) -> Tensor:
    """Only the update of the leading tokens of each image, which attend to the active ones, or to all.

    For the last layer below a head that reads nothing else. The leading tokens must be active.

    Args:
        branch: The heavy branch.
        x: Its input, (B, N, C).
        out: What the update is added to, (B, read, C).
        dispatch: What was decided about ``x``; with ``keys='all'`` nobody asks.
        keys: Which tokens may be attended to, ``'active'`` or ``'all'``.
        executor: Those that skip compute keys and values of the active tokens only.

    Returns:
        (B, read, C).
    """
    read = out.shape[1]
    if keys == 'all':
        return out + branch(x, Layout(read=read))
    if executor not in SKIPPING:
        return out + branch(x, Layout(keys=_hidden(dispatch).keys, read=read))
    active = x.flatten(0, 1).index_select(0, dispatch.rows())
    if executor == 'fixed':
        update = branch(active.view(x.shape[0], dispatch.active, x.shape[2]), Layout(read=read))
    else:
        update = branch(active.unsqueeze(0), Layout(lengths=Lengths(dispatch.mask), read=read))
    return out + _noticing(update.flatten(0, 1), dispatch).view(out.shape)


def choose(wanted: str, dispatch: Dispatch, break_even: float | None) -> str:
    """Which executor of inference runs.

    Args:
        wanted: One of these, or ``'auto'``: ``'fixed'`` where the number of active tokens is known before any score,
            else ``'packed'``.
        dispatch: What was decided. With ``wanted='fixed'`` it must know the number of active tokens.
        break_even: Share of active tokens from which on skipping takes longer than running all, so that all run; None
            is never. With a threshold the share is known after a GPU was waited for, as ``'packed'`` does anyway.

    Raises:
        ValueError: If ``'fixed'`` is wanted of a decision by a threshold.
    """
    if wanted == 'fixed' and dispatch.padding is not None:
        wanted = 'auto'  # images with padding have fewer tokens that count than others
    if wanted == 'fixed' and dispatch.active is None:
        raise ValueError(
            "inference must be 'auto' or 'packed' unless every dispatcher has a capacity, got 'fixed'. Calibrate with "
            'per_image=True (tools/calibrate.py --per-image). Cells must divide the grid, else images differ.'
        )
    if wanted == 'auto':
        wanted = 'packed' if dispatch.active is None else 'fixed'
    if break_even is None or wanted not in SKIPPING:
        return wanted
    if dispatch.active is None:
        active, tokens = dispatch.rows().shape[0], dispatch.mask.shape[:2].numel()
    else:  # of each image alike: how many images there are stays open in an export
        active, tokens = dispatch.active, dispatch.order.shape[1]
    return 'masked' if runs_all(active, tokens, break_even) else wanted


def runs_all(active: float, tokens: int, break_even: float | None) -> bool:
    """Whether all of N tokens run a branch when some are active, since skipping the others would take longer."""
    return break_even is not None and active >= break_even * tokens


def _hidden(dispatch: Dispatch) -> Layout:
    """The layout in which inactive keys are hidden."""
    return Layout(keys=dispatch.mask.detach().squeeze(-1) > 0)


def surplus_rows(active: int, x: Tensor) -> int:
    """How many rows beyond the active ones run along, so that their number is a round one.

    For halves on a CPU, where oneDNN plans a product anew for each number of rows, which takes as long as the product
    itself in a small ViT. Rounded to 5 significant bits, which adds 2 % on average; small numbers soon come again.

    Args:
        active: Active tokens of all images.
        x: The tokens.
    """
    halves = x.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(x.device.type)
    if x.device.type != 'cpu' or not halves or active < FEW_ROWS:
        return 0
    return -active % 2 ** max(0, active.bit_length() - 5)


def _update(branch: Branch, x: Tensor, dispatch: Dispatch, keys: str, surplus: int = 0) -> Tensor:
    """The branch's update of the active tokens, packed into (K, C); ``surplus`` rows run along and are dropped."""
    rows, lengths = dispatch.rows(), Lengths(dispatch.mask, surplus)
    active = rows.shape[0]
    if surplus:
        rows = torch.cat([rows, rows[:1].expand(surplus)])
    if keys == 'all':
        update = branch(x, Layout(rows=rows, lengths=lengths))
    else:
        update = branch(x.flatten(0, 1).index_select(0, rows).unsqueeze(0), Layout(lengths=lengths))
    return update[0, :active] if surplus else update.squeeze(0)


def _scatter(update: Tensor, out: Tensor, dispatch: Dispatch) -> Tensor:
    """Add an update (K, C) to the active tokens of ``out``, in place, eq. (6)."""
    # a model without prefix tokens hands over transposed tokens: flatten would copy those, and the writes be lost
    rows = out.contiguous().flatten(0, 1)
    update, active = _noticing(update, dispatch), dispatch.rows()
    if kernels.usable(out):
        return kernels.add_rows(rows, active, update).view(out.shape)
    update = update.to(out.dtype)
    if out.is_cuda and torch.compiler.is_compiling() and not exporting():
        # compiled for a GPU, index_add_ adds atomically, or sorts its indices: it cannot know that none comes twice
        return rows.index_copy_(0, active, rows.index_select(0, active) + update).view(out.shape)
    return rows.index_add_(0, active, update).view(out.shape)


def _noticing(update: Tensor, dispatch: Dispatch) -> Tensor:
    """An update of the active tokens, (K, C), image by image, that is NaN where no patch token runs and one is NaN.

    Else the prefix would never hear of it, and an image of NaN get a finite score. See ``with_broken_tokens``.
    """
    if dispatch.active != dispatch.num_prefix_tokens or not dispatch.logits.shape[1]:
        return update
    broken = (0 * dispatch.logits).sum(dim=1, keepdim=True).to(update.dtype)  # (B, 1, 1)
    return (update.unflatten(0, (broken.shape[0], -1)) + broken).view(update.shape)


SKIPPING = ('packed', 'fixed')
EXECUTORS: dict[str, Executor] = {
    'masked': masked,
    'split': split,
    'active_only': active_only,
    'masked_all_keys': masked_all_keys,
    'packed': packed,
    'fixed': fixed,
}
