"""What a dispatcher decides, and the masks it decides with. B images, N tokens incl. P prefix tokens, M = N - P."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels


class Dispatch:
    """What a dispatcher decided for one batch of tokens; never changed after it was made.

    Attributes:
        mask: (B, N, 1), exactly 0 or 1; its gradient is that of the soft score (straight-through). Prefix
            tokens are always 1.
        logits: (B, N - P, 1) in fp32, before noise and temperature; None where no dispatcher ran.
        num_prefix_tokens: P, the leading tokens (CLS, registers, prompts) that are always active.
        complete: Whether every token runs, whatever it is; nothing then waits for the mask.
        active: Active tokens of each image, where that is known before any score: the same number in all. Else None.
        padding: (B, N - P, 1) bool, patch tokens that lie wholly in padding, which count in no rate; None is none.
        owner: (B, n) long, of which patch token each of the n patches of the image is part, where these became fewer
            tokens; -1 where it was dropped. None is each its own.
        hidden: (B, n) bool, patches of the image that lie wholly in padding, where tokens became fewer; None is none.
    """

    active: int | None = None
    padding: Tensor | None = None
    owner: Tensor | None = None
    hidden: Tensor | None = None

    def __init__(self, mask: Tensor | None, logits: Tensor | None, num_prefix_tokens: int, complete: bool = False):
        self._mask = mask
        self.logits = logits
        self.num_prefix_tokens = num_prefix_tokens
        self.complete = complete
        self._rows: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """(B, N, 1)."""
        return self._mask

    @property
    def tokens(self) -> int:
        """N."""
        return self.mask.shape[1]

    @property
    def patch_mask(self) -> Tensor:
        """(B, N - P, 1): the mask of the patch tokens, the ones that rates are counted on."""
        return self.mask[:, self.num_prefix_tokens :]

    def counted(self, values: Tensor) -> Tensor:
        """Of values (B, N - P, 1) of the patch tokens those of tokens that count, flat: all but padding."""
        return values.flatten() if self.padding is None else values[~self.padding]

    def on_patches(self, values: Tensor, dropped: float = 0.0) -> Tensor:
        """Values (B, N - P, 1) of the patch tokens for each patch of the image, (B, n, 1)."""
        if self.owner is None or not values.shape[1]:  # the latter where none is read any more
            return values
        found = values.gather(1, self.owner.clamp(min=0).unsqueeze(-1))
        return found.masked_fill((self.owner < 0).unsqueeze(-1), dropped)

    def took_part(self) -> Tensor:
        """(B, n, 1): which patches of the image ran; of a token that stands for s of them, each 1 / s of it."""
        mask = self.patch_mask
        if self.owner is None or not mask.shape[1]:
            return mask if self.padding is None or not mask.shape[1] else mask.masked_fill(self.padding, 0.0)
        counts, like = self.owner >= 0, self.patch_mask.squeeze(-1)
        counts = counts if self.hidden is None else counts & ~self.hidden
        sizes = torch.zeros_like(like).scatter_add(1, self.owner.clamp(min=0), counts.to(like.dtype))
        return self.on_patches(self.patch_mask / sizes.clamp(min=1).unsqueeze(-1)) * counts.unsqueeze(-1)

    def padded_patches(self) -> Tensor | None:
        """(B, n, 1) bool: patches of the image that lie wholly in padding; None is none."""
        return self.padding if self.owner is None else None if self.hidden is None else self.hidden.unsqueeze(-1)

    @property
    def learnt(self) -> bool:
        """Whether a gradient flows into the mask."""
        return self.mask.requires_grad

    def rows(self) -> Tensor:
        """The active ones among all B * N tokens, in order; computed once. A GPU is waited for, for their number."""
        if self._rows is None:
            self._rows = self.mask.detach().flatten().nonzero().squeeze(1)
        return self._rows

    def inactive_rows(self) -> Tensor:
        """The inactive ones among all B * N tokens."""
        return (self.mask.detach().flatten() == 0).nonzero().squeeze(1)

    def with_mask(self, mask: Tensor) -> 'Dispatch':
        """The same decision with another mask."""
        dispatch = Dispatch(mask, self.logits, self.num_prefix_tokens, self.complete)
        dispatch.padding, dispatch.owner, dispatch.hidden = self.padding, self.owner, self.hidden
        return dispatch


class BestTokens(Dispatch):
    """The decision that an equal number of tokens runs in each image: the prefix and those of the highest logits.

    Nothing in it depends on data but the order, so a GPU is not waited for and the shapes can be exported.

    Args:
        order: (B, N), the tokens of each image, the active ones first.
        active: K, how many these are, prefix included.
        logits: As of :class:`Dispatch`.
        num_prefix_tokens: As of :class:`Dispatch`.
        rows: The active ones among all B * N tokens, (B * K,), image by image; None leaves them to the order.
    """

    def __init__(self, order: Tensor, active: int, logits: Tensor, num_prefix_tokens: int, rows: Tensor | None = None):
        super().__init__(None, logits, num_prefix_tokens)
        self.order = order
        self.active = active
        self._rows = rows

    @property
    def mask(self) -> Tensor:
        """(B, N, 1); made when somebody asks for it."""
        if self._mask is None:
            zeros = torch.zeros(self.order.shape, dtype=self.logits.dtype, device=self.order.device)
            self._mask = zeros.scatter(1, self.order[:, : self.active], 1.0).unsqueeze(-1)
        return self._mask

    @property
    def tokens(self) -> int:
        """N, for which no mask is made."""
        return self.order.shape[1]

    @property
    def learnt(self) -> bool:
        """Never: an order has no gradient."""
        return False

    def rows(self) -> Tensor:
        """(B * K,), image by image."""
        if self._rows is None:
            self._rows = self._flat(self.order[:, : self.active])
        return self._rows

    def inactive_rows(self) -> Tensor:
        """(B * (N - K),), image by image."""
        return self._flat(self.order[:, self.active :])

    def _flat(self, index: Tensor) -> Tensor:
        """Places within images as places within the batch."""
        images, tokens = self.order.shape
        if images == 1:
            return index.flatten()
        return (index + torch.arange(0, images * tokens, tokens, device=index.device)[:, None]).flatten()


class EveryToken(Dispatch):
    """The decision that every token runs.

    Args:
        x: The tokens, (B, N, C).
        num_prefix_tokens: As of :class:`Dispatch`.
    """

    def __init__(self, x: Tensor, num_prefix_tokens: int):
        super().__init__(None, None, num_prefix_tokens, complete=True)
        self._like = x.shape[:2], dict(dtype=x.dtype, device=x.device)

    @property
    def mask(self) -> Tensor:
        """(B, N, 1); made when somebody asks for it, and takes no memory."""
        if self._mask is None:
            shape, options = self._like
            self._mask = torch.ones((), **options).expand(*shape, 1)
        return self._mask

    @property
    def tokens(self) -> int:
        """N, for which no mask is made."""
        return self._like[0][1]


def best_tokens(logits: Tensor, capacity: float, num_prefix_tokens: int) -> BestTokens:
    """The same number of active tokens in each image, those of the highest logits; noise-free.

    Tokens whose logit is no number come first: see :func:`with_broken_tokens`.

    Args:
        logits: (B, M, 1).
        capacity: Fraction of the M tokens that are active, in [0, 1], to the nearest token.
        num_prefix_tokens: P, active beside these.
    """
    active = num_prefix_tokens + round(capacity * logits.shape[1])
    if logits.dtype == torch.float32 and kernels.usable(logits):
        order, rows = kernels.order_tokens(logits, active, num_prefix_tokens)
        return BestTokens(order, active, logits, num_prefix_tokens, rows)
    scores = logits.squeeze(-1).nan_to_num(torch.inf, torch.inf, torch.inf)
    # the prefix leads the order: above any score, and the sort is stable
    order = F.pad(scores, (num_prefix_tokens, 0), value=torch.inf).argsort(dim=1, descending=True, stable=True)
    return BestTokens(order, active, logits, num_prefix_tokens)


def with_broken_tokens(dispatch: Dispatch, x: Tensor) -> Dispatch:
    """The dispatch with every token active that is no number (NaN, infinite), whatever was decided about it.

    Skipped, it would hide from the tokens that attend to active ones only: an image of NaN would get a finite score.

    Args:
        dispatch: What was decided about ``x``. Where it has logits, these tell which tokens are broken.
        x: (B, N, C).
    """
    if dispatch.complete or dispatch.active is not None:  # best_tokens takes broken ones first
        return dispatch
    prefix = dispatch.num_prefix_tokens
    told_by = x[:, prefix:] if dispatch.logits is None else dispatch.logits
    broken = F.pad(~told_by.isfinite().all(dim=-1, keepdim=True), (0, 0, prefix, 0))
    return dispatch.with_mask(dispatch.mask.masked_fill(broken, 1.0))


def without_padding(dispatch: Dispatch, padding: Tensor | None) -> Dispatch:
    """The dispatch in which no token is active that lies wholly in padding.

    Of a share of the tokens of each image it is then that share of those which count: their number differs from image
    to image. The complete model runs all tokens, as its host does, and only counts fewer.

    Args:
        dispatch: What was decided.
        padding: (B, N - P) bool; None is none.
    """
    prefix = dispatch.num_prefix_tokens
    if padding is None or not dispatch.patch_mask.shape[1]:
        return dispatch
    padding = padding.unsqueeze(-1)
    if dispatch.complete:
        found = dispatch  # it has no mask yet
    else:
        mask = dispatch.mask if dispatch.active is None else _share_of_counted(dispatch, padding)
        found = dispatch.with_mask(mask.masked_fill(F.pad(padding, (0, 0, prefix, 0)), 0.0))
    found.padding = padding
    return found


def _share_of_counted(dispatch: BestTokens, padding: Tensor) -> Tensor:
    """The mask (B, N, 1) of the best ones among the tokens that count, as large a share of these as of all."""
    prefix = dispatch.num_prefix_tokens
    best_first = dispatch.order[:, prefix:]
    counts = ~padding.squeeze(-1).gather(1, best_first - prefix)
    wanted = (dispatch.active - prefix) * counts.sum(dim=1, keepdim=True) / counts.shape[1]
    active = counts & (counts.cumsum(dim=1) <= wanted.round())
    mask = torch.ones_like(dispatch.order, dtype=dispatch.logits.dtype)
    return mask.scatter(1, best_first, active.to(mask.dtype)).unsqueeze(-1)


def gumbel_sigmoid(logits: Tensor, tau: float) -> Tensor:
    """Noisy soft score of each token, eq. (4): ``sigmoid((logits + G1 - G2) / tau)``.

    The noise is drawn in the dtype of ``logits``, which must be fp32 or wider: in half precision the tails of the
    Gumbel distribution are lost. ``P(score > 0.5) = sigmoid(logits)`` for every ``tau``.

    Args:
        logits: Any shape.
        tau: Gumbel temperature, > 0.

    Shape:
        Same as ``logits``.
    """
    gumbel = -torch.empty_like(logits).exponential_().log()
    gumbel2 = -torch.empty_like(logits).exponential_().log()
    return torch.sigmoid((logits + gumbel - gumbel2) / tau)  # eq. (4)


def straight_through(score: Tensor, hard: Tensor | None = None) -> Tensor:
    """Hard mask with the gradient of ``score``, eq. (5); the mask is ``score > 0.5`` unless it is given.

    ``score - score.detach()`` is exactly zero, so the mask is exactly 0 or 1 in any precision.

    paper silent: eq. (5) says "Block(X) * S backward". Read here as in every straight-through estimator: the *mask* has
    the gradient of S. The gradient into Block(X) keeps the hard mask, that of the function which ran.

    Shape:
        Same as ``score``.
    """
    if hard is None:
        hard = (score > 0.5).to(score.dtype)
    return hard + (score - score.detach())


def hard_mask(logits: Tensor, threshold: Tensor) -> Tensor:
    """Noise-free mask of inference: ``logit > threshold``, compared in the dtype of ``logits``.

    A threshold of 0 is eq. (3): ``logit > 0`` is ``sigmoid(logit) > 0.5`` without its rounding.

    differs from paper: a tie, sigmoid = 0.5, is inactive here and active in eq. (3).

    Args:
        logits: Any shape, in fp32 or wider.
        threshold: A scalar of any dtype, in logit units.

    Shape:
        Same as ``logits``.
    """
    return (logits > threshold.to(logits)).to(logits.dtype)
