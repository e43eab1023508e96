"""Fewer tokens: what becomes of each where a step keeps some of them and merges or drops the others.

A step scores or matches tokens, makes a plan, and the state of the tokens applies it. B images, M patch tokens before a
step, K after it, C width. No shape depends on data, so images of a batch have equally many tokens, and models can be
exported.
"""

import torch
from torch import Tensor


class Plan:
    """What a step does to the patch tokens of each image.

    Attributes:
        slots: (B, M) long, the place of each token among the K after the step; -1 where it is dropped.
        stays: (B, M) bool, tokens that go on under their own name; the cells of others are *left*, unless merged.
            Merging, a token goes on in the one that it became a part of.
        number: K.
        leaves: Whether some tokens do not stay.
        drops: Whether some tokens have no place after it.
    """

    slots: Tensor
    stays: Tensor
    number: int
    leaves: bool = True
    drops: bool = False

    def apply(self, x: Tensor) -> Tensor:
        """(B, M, C) -> (B, K, C)."""
        raise TypeError(f'{type(self).__name__} must say what becomes of tokens.')

    def spread(self, values: Tensor) -> Tensor:
        """Values (B, K, C) of the tokens after the step for each token before it, (B, M, C); 0 for what is dropped."""
        found = values.gather(1, self.slots.clamp(min=0).unsqueeze(-1).expand(-1, -1, values.shape[2]))
        return found.masked_fill((self.slots < 0).unsqueeze(-1), 0.0) if self.drops else found

    def total(self, values: Tensor) -> Tensor:
        """Sums (B, K) of values (B, M) over the tokens that each token after the step is made of."""
        slots = self.slots.where(self.slots >= 0, self.number)  # what is dropped falls behind the last one
        sums = values.new_zeros(values.shape[0], self.number + 1).scatter_add(1, slots, values)
        return sums[:, : self.number]


class Keep(Plan):
    """The best tokens stay, in their order; what is left becomes one more token behind them, or is dropped.

    Source: EViT (Liang et al., ICLR 2022, arXiv 2202.07800), as in Sparse-Tuning (arXiv 2405.14700).

    Args:
        index: (B, K'), the tokens that stay, ascending.
        scores: (B, M), of all of them; with a gradient where they are learnt.
        fuse: ``'sum'``, the others become their sum weighted by the scores; ``'mean'``, divided by the sum of these
            scores; ``'none'``, they are dropped.
        padding: (B, M) bool, tokens of padding, which are in no sum; None is none.
    """

    def __init__(self, index: Tensor, scores: Tensor, fuse: str, padding: Tensor | None = None):
        kept, number = torch.zeros_like(scores, dtype=torch.bool).scatter(1, index, True), index.shape[1]
        self.index, self.stays, self.drops = index, kept, fuse == 'none'
        self.number = number + (not self.drops)
        places = kept.long().cumsum(1) - 1
        self.slots = places.where(kept, -1 if self.drops else number)
        self.weights: Tensor | None = None
        if not self.drops:
            gone = kept if padding is None else kept | padding
            self.weights = scores.masked_fill(gone, 0.0)
            if fuse == 'mean':
                whole = self.weights.sum(1, keepdim=True)
                self.weights = self.weights / whole.where(whole > 0, 1.0)

    def apply(self, x: Tensor) -> Tensor:
        """Gather what stays; behind it the weighted sum of the others."""
        kept = x.gather(1, self.index.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        if self.weights is None:
            return kept
        return torch.cat([kept, self.weights.to(x.dtype).unsqueeze(1) @ x], dim=1)


def keep_best(scores: Tensor, number: int, fuse: str, padding: Tensor | None = None) -> Keep:
    """The plan that the tokens of the highest scores stay; which these are has no gradient.

    Args:
        scores: (B, M).
        number: How many stay, at most M.
        fuse: As of :class:`Keep`.
        padding: (B, M) bool, tokens that stay only where there are not enough others; None is none.
    """
    ranked = scores.detach() if padding is None else scores.detach().masked_fill(padding, -torch.inf)
    best = ranked.argsort(dim=1, descending=True, stable=True)[:, :number]
    return Keep(best.sort(dim=1).values, scores, fuse, padding)


class Merge(Plan):
    """Some tokens become part of others: means weighted by how many tokens of the image each of them stands for.

    Source: ToMe (Bolya et al., ICLR 2023, arXiv 2210.09461).

    Args:
        order: (B, M), first the r tokens that are merged, then those that stay, in the order that they will have.
        into: (B, r), into which of the latter each one goes: a place among the M - r after the step.
        sizes: (B, M), how many tokens of the image each one stands for.
    """

    leaves = False

    def __init__(self, order: Tensor, into: Tensor, sizes: Tensor):
        merged = into.shape[1]
        self.number = order.shape[1] - merged
        self._from, self._stay, self._into = order[:, :merged], order[:, merged:], into
        places = torch.arange(self.number, device=order.device).expand(order.shape[0], -1)
        self.slots = torch.empty_like(order).scatter(1, order, torch.cat([into, places], dim=1))
        self.stays = torch.ones_like(order, dtype=torch.bool)
        whole = self.total(sizes)
        self._shares = sizes.gather(1, self._from) / whole.gather(1, into)

    def apply(self, x: Tensor) -> Tensor:
        """``x_b + sum s_a / s (x_a - x_b)``: the weighted mean, and exactly ``x_b`` where nothing is merged into it."""
        width = (-1, -1, x.shape[2])
        gone, stay = (x.gather(1, index.unsqueeze(-1).expand(*width)) for index in (self._from, self._stay))
        into = self._into.unsqueeze(-1).expand(*width)
        difference = self._shares.to(x.dtype).unsqueeze(-1) * (gone - stay.gather(1, into))
        return stay.scatter_add(1, into, difference)


def match_pairs(metric: Tensor, number: int, sizes: Tensor, first: int = 0, padding: Tensor | None = None) -> Merge:
    """The plan to merge the most similar pairs of two alternating sets of tokens: bipartite soft matching.

    Every token of set A, at even positions of the sequence, finds the most similar one of set B, at odd positions; the
    closest pairs merge. After it come what is left of A, then B, each in its order. Padding merges with padding,
    and first; with others only where there are no more pairs.

    Source: ToMe, section 3.  # differs from paper: prefix tokens are never in a set, also as targets; the paper spares
    the class token, the first of A.

    Args:
        metric: (B, M, D), compared by cosine; has no gradient.
        number: Pairs r, at most half of M: so many tokens set A always has.
        sizes: (B, M).
        first: Position of the first of the M tokens in the sequence.
        padding: (B, M) bool; None is none.
    """
    metric = torch.nn.functional.normalize(metric.detach(), dim=-1)
    a, b = (torch.arange((first + offset) % 2, metric.shape[1], 2, device=metric.device) for offset in (0, 1))
    alike = metric[:, a] @ metric[:, b].transpose(1, 2)  # (B, |A|, |B|)
    if padding is not None:
        of_a, of_b = padding[:, a, None], padding[:, None, b]
        alike = alike.masked_fill(of_a != of_b, -torch.inf).masked_fill(of_a & of_b, 2.0)
    best, partner = alike.max(dim=-1)
    ranked = best.argsort(dim=1, descending=True, stable=True)
    merged, left = ranked[:, :number], ranked[:, number:].sort(dim=1).values
    order = torch.cat([a[merged], a[left], b.expand(metric.shape[0], -1)], dim=1)
    return Merge(order, left.shape[1] + partner.gather(1, merged), sizes)
