"""What is known of the tokens in one pass through a network."""

from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .macs import Count
from .reduction import Plan
from .restoring import ADAPT, KEEP_VALUES, NEED_OWNER, RESTORE, WITHOUT_OWNER, of_cells


class TokenState:
    """What blocks and parts must know of the sequence beside its values; made anew for each pass.

    No dataclass: torch takes these apart and copies them where they are given to a module, as in ``fully_shard``, and
    what a block notes would be lost.

    Sequences are laid out as [prefix of the host (CLS, registers), prompts, patch tokens]. Parts may make the latter
    fewer: then the state knows which token each patch of the image is part of, and gives every patch a feature again.

    Attributes:
        prefix: Leading tokens of the host that are no patches: CLS, registers.
        prompts: Tokens that parts inserted after these. They are never dispatched, counted in a rate, or in a map.
        grid: Rows and columns of the patch tokens; None where there is none.
        frames: Frames of a clip: that many neighbours in the batch belong together. 1 for images.
        padding: (B, patch tokens) bool, those that lie wholly in padding: never dispatched or counted; None is none.
        restoring: How patches get a feature whose token is no more, by a word of :data:`~mmdyt.core.restoring.RESTORE`;
            None where nobody reads patches.
        owner: (B, patches of the image) long, the place among the present patch tokens of the one that each patch is
            part of; -1 where it was dropped. None is each its own.
        live: (B, patches of the image) bool, those whose token goes on under its own name, or merged.
        left: (B, patches of the image, C), values with which the others left; None where there are none, or no need.
        joined: The same, of the token that they became a part of, just after that.
        hidden: (B, patches of the image) bool, those that lie wholly in padding, where tokens became fewer.
        sizes: (B, patch tokens), for how many tokens of the image each one stands in attention; None is one each.
        carried: What parts carry from block to block, (B, N, C) by a name of theirs; fewer as the tokens become fewer.
        attended: Queries and keys of the last attention, (B, H, N, D) each, where a part reads them.
        since: The plans by which the tokens became fewer since.
        before: Tokens that count before each operation that acted in the present block since its attention.
        rows: Tokens that count for which the MLP of the present block runs; None is as many as there are.
        read: Leading tokens whose result the last block must give; None is all of them.
        decided: What was decided in this pass, by dispatcher; branches tell it, for layers that share a decision.
        probes: What was restored for each level, and zeros (B, N, C) that were added to it, whose derivative is that of
            the level alone; None where nobody asks.
        unskipped: Whether a branch would have skipped tokens, had gradients been disabled; branches tell it.
        dense: Whether a branch ran all tokens since skipping them would have taken longer; branches tell it.
    """

    prefix: int = 0
    prompts: int = 0
    grid: tuple[int, int] | None = None
    frames: int = 1
    padding: Tensor | None = None
    restoring: str | None = None
    owner: Tensor | None = None
    live: Tensor | None = None
    left: Tensor | None = None
    joined: Tensor | None = None
    hidden: Tensor | None = None
    sizes: Tensor | None = None
    carried: dict[Hashable, Tensor]
    attended: tuple[Tensor, Tensor] | None = None
    since: tuple[Plan, ...] = ()
    before: tuple[Count, ...] = ()
    rows: Count | None = None
    read: int | None = None
    decided: dict[Hashable, Any]
    probes: list[tuple[Tensor, Tensor]] | None = None
    unskipped: bool = False
    dense: bool = False

    def __init__(self, prefix: int = 0, **known):
        self.prefix = prefix
        self.carried, self.decided = {}, {}
        for name, value in known.items():
            if name not in TokenState.__annotations__:
                raise TypeError(f'{name} must be one of {list(TokenState.__annotations__)}.')
            setattr(self, name, value)

    def replaced(self, **changes) -> 'TokenState':
        """The same but for some attributes."""
        return TokenState(**({name: getattr(self, name) for name in TokenState.__annotations__} | changes))

    def all_read(self) -> 'TokenState':
        """The same, for a branch whose every result is wanted."""
        return self.replaced(read=None)

    def insert(self, x: Tensor, prompts: Tensor) -> Tensor:
        """Put prompts (m, C), or those of each image (B, m, C), into the place of the present ones.

        Where there are none yet, they go behind the prefix.

        Shape:
            x (B, N, C) -> (B, N - present + m, C).
        """
        before, after = x[:, : self.prefix], x[:, self.first :]
        self.prompts = prompts.shape[-2]
        return torch.cat([before, prompts.to(x.dtype).expand(x.shape[0], -1, -1), after], dim=1)

    @property
    def first(self) -> int:
        """Place of the first patch token in the sequence: prefix and prompts."""
        return self.prefix + self.prompts

    def begin_block(self) -> None:
        """Forget what operations of the block before did."""
        self.before, self.rows = (), None

    def counted(self, x: Tensor) -> Count:
        """How many of the tokens of each image count: all but padding."""
        if self.padding is None or x.shape[1] <= self.first:  # no patch token is left
            return x.shape[1]
        return x.shape[1] - self.padding.sum(dim=1)

    def note_step(self, x: Tensor) -> None:
        """Keep how many tokens an operation sees."""
        self.before = (*self.before, self.counted(x))

    def note_rows(self, plan: Plan) -> None:
        """Keep for how many tokens the MLP runs by a plan around it."""
        self.rows = self.first + plan.number
        if self.padding is not None:
            self.rows = self.first + (plan.total((~self.padding).float()) > 0).sum(dim=1)

    def reduce(self, x: Tensor, plan: Plan) -> Tensor:
        """Apply a plan to the patch tokens, and to whatever else is laid out as they are.

        Shape:
            x (B, N, C) -> (B, N - M + K, C).

        Raises:
            ValueError: If tokens are dropped that could not be restored as is wanted.
        """
        if plan.drops and self.restoring in NEED_OWNER:
            raise ValueError(f'restore must be {WITHOUT_OWNER} where tokens are dropped, got {self.restoring!r}.')
        carried = {name: self._reduced(tensor, plan) for name, tensor in self.carried.items()}
        after = self._reduced(x, plan)
        self._note(x[:, self.first :], after[:, self.first :], plan)
        self.carried.clear()
        self.carried.update(carried)
        if self.attended is not None:
            self.since = (*self.since, plan)
        if self.sizes is not None:
            self.sizes = plan.total(self.sizes)
        if self.padding is not None:
            self.padding = plan.total((~self.padding).float()) == 0
        return after

    def _reduced(self, x: Tensor, plan: Plan) -> Tensor:
        return torch.cat([x[:, : self.first], plan.apply(x[:, self.first :])], dim=1)

    def _note(self, before: Tensor, after: Tensor, plan: Plan) -> None:
        """Where each patch of the image is now, and with which value it left."""
        if self.owner is None:
            self.owner = torch.arange(before.shape[1], device=before.device).expand(before.shape[0], -1)
            self.live, self.hidden = torch.ones_like(self.owner, dtype=torch.bool), self.padding
        place = self.owner.clamp(min=0)
        self.owner, stays = plan.slots.gather(1, place).where(self.owner >= 0, -1), plan.stays.gather(1, place)
        if not plan.leaves:
            return
        leaving = (self.live & ~stays).unsqueeze(-1)
        self.live = self.live & stays
        if self.restoring in KEEP_VALUES:
            self.left = _filled(self.left, leaving, of_cells(before, place))
        if self.restoring == 'stale+delta':
            self.joined = _filled(self.joined, leaving, of_cells(after, self.owner.clamp(min=0)))

    @property
    def cells(self) -> Count:
        """Cells that left for which adapters run on; computed for all of the image, but for padding."""
        if self.left is None or self.restoring != ADAPT:
            return 0
        return self.owner.shape[1] if self.hidden is None else (~self.hidden).sum(dim=1)

    def note_attention(self, query: Tensor | None, key: Tensor | None) -> None:
        """Keep queries and keys of the last attention for parts that read them; None forgets them."""
        self.attended, self.since = None if key is None else (query, key), ()

    def queries_of_present(self, leading: int | None = None) -> Tensor:
        """Queries of the last attention, (B, H, N, D), of the present tokens, or of some that lead and are no patches.

        Raises:
            ValueError: If there was none.
        """
        queries = self._attended()[0]
        return self._of_present(queries) if leading is None else queries[:, :, :leading]

    def keys_of_present(self) -> Tensor:
        """Keys of the last attention, (B, H, N, D), of the present tokens; raises as :meth:`queries_of_present`."""
        return self._of_present(self._attended()[1])

    def _attended(self) -> tuple[Tensor, Tensor]:
        if self.attended is None:
            raise ValueError('attention must run on all tokens before its queries and keys are read, got none.')
        return self.attended

    def _of_present(self, tensor: Tensor) -> Tensor:
        """What became of a tensor of heads (B, H, N, D) as the tokens became fewer."""
        heads = tensor.shape[1]
        for plan in self.since:
            tensor = self._reduced(tensor.transpose(1, 2).flatten(2), plan).unflatten(2, (heads, -1)).transpose(1, 2)
        return tensor

    def count_sizes(self, x: Tensor) -> Tensor:
        """How many tokens of the image each patch token stands for, (B, M); from now on attention goes by it."""
        if self.sizes is None:
            self.sizes = x.new_ones(x.shape[0], x.shape[1] - self.first, dtype=torch.float32)
        return self.sizes

    def key_bias(self) -> Tensor | None:
        """(B, 1, 1, N), added to the scores of keys: a token that stands for s counts like s; None is nothing."""
        if self.sizes is None:
            return None
        return F.pad(self.sizes.log(), (self.first, 0))[:, None, None]

    def restore(self, x: Tensor) -> Tensor:
        """The tokens as the host laid them out, without what parts inserted, and one for each patch again."""
        if self.probes is not None:
            self.probes.append((x, torch.zeros_like(x).requires_grad_()))
            x = x + self.probes[-1][1]
        if self.owner is not None and self.restoring is not None:
            patches = RESTORE[self.restoring](self, x[:, self.first :])
        elif not self.prompts:
            return x
        else:
            patches = x[:, self.first :]
        return torch.cat([x[:, : self.prefix], patches], dim=1)


def _filled(kept: Tensor | None, where: Tensor, values: Tensor) -> Tensor:
    """Values where a mask says so, else those that are there; zero where there are none yet."""
    return torch.where(where, values, torch.zeros_like(values) if kept is None else kept)
