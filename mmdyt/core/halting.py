"""Adaptive halting: how much of a token's output each block gives, and when it halts. B images, N tokens, L blocks.

Block l (of 1 to L) gives each token a halting score h in [0, 1]; the last block's is 1. A token halts behind the first
block n at which its scores sum to 1 - eps or more. Block l has the weight p: h before n, R = 1 - sum of h before n at
n, and 0 after it; the weights of a token sum to 1. Source: A-ViT (Yin et al., arXiv 2112.07658), after Graves (2016).
"""

import torch
from torch import Tensor

LEAST = 1e-6  # of a mean score in the logarithm: where every token halted there is none


class Halting:
    """The tokens of one pass: what is left of each until it halts, and the weighted sum of its values; never changed.

    Attributes:
        eps: How much less than 1 the scores must sum to.
        left: (B, N, 1), 1 - eps minus the sum of the scores; positive where a token still runs. None before the first.
        output: (B, n, C), the sum of p x of the n leading tokens so far.
    """

    def __init__(self, eps: float, left: Tensor | None = None, output: Tensor | float = 0.0):
        self.eps, self.left, self.output = eps, left, output

    def step(self, score: Tensor, x: Tensor) -> 'Halting':
        """With what a block gave.

        Args:
            score: h (B, N, 1); of tokens that halted before it is not read.
            x: (B, n, C), values of the leading tokens that are summed.
        """
        left = score.new_full(score.shape, 1 - self.eps) if self.left is None else self.left
        running = left > 0
        after = torch.where(running, left - score, left)
        weight = torch.where(after > 0, score, left + self.eps)  # h, or at the halting block R
        return Halting(self.eps, after, self._added(torch.where(running, weight, torch.zeros_like(weight)), x))

    def total(self, x: Tensor) -> Tensor:
        """The whole sum of p x, (B, n, C), with what the last block gave."""
        weight = torch.where(self.left > 0, self.left + self.eps, torch.zeros_like(self.left))
        return self._added(weight, x).to(x.dtype)

    def _added(self, weight: Tensor, x: Tensor) -> Tensor:
        return self.output + weight[:, : x.shape[1]] * x


def block_scores(left: Tensor, eps: float) -> Tensor:
    """Scores (T, K + 1) of K blocks and the last one, 0 where a token had halted before, from what was left behind K.

    Args:
        left: (T, K), of T tokens behind each of K blocks that follow each other.
        eps: As above.
    """
    before = torch.cat([torch.full_like(left[:, :1], 1 - eps), left], dim=1)
    return torch.cat([before[:, :-1] - left, (left[:, -1:] > 0).to(left.dtype)], dim=1)


def depth_of(left: Tensor, depth: int) -> Tensor:
    """How many of L blocks a token ran, n (T,); arguments as of :func:`block_scores`."""
    return depth - (left <= 0).to(left.dtype).sum(dim=1)


def remainder(left: Tensor, eps: float) -> Tensor:
    """What the scores before the halting block leave of 1, R (T,); arguments as of :func:`block_scores`."""
    running = torch.where(left > 0, left, torch.full_like(left, 1 - eps))
    return running.amin(dim=1).clamp(max=1 - eps) + eps


def prior_loss(scores: Tensor, blocks: Tensor, mean: float, std: float) -> Tensor:
    """KL divergence of the mean scores of the blocks from a Gaussian, both normalised: sum of q log(q / H).

    paper silent: what its scores are divided by, which sum to more than 1. Halted tokens have none here, and H is
    divided by its sum, so that the divergence is 0 at best.

    Args:
        scores: (T, K), as of :func:`block_scores`.
        blocks: (K,), numbers of these blocks, from 1.
        mean: Of the Gaussian, in blocks.
        std: The same.
    """
    log_prior = (-((blocks - mean) ** 2) / (2 * std**2)).log_softmax(dim=0)
    found = scores.mean(dim=0)
    log_found = (found / found.sum()).clamp(min=LEAST).log()
    return (log_prior.exp() * (log_prior - log_found)).sum()
