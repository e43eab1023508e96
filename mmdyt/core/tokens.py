"""What is known of the tokens in one pass through a network."""

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class TokenState:
    """What blocks and parts must know of the sequence beside its values; made anew for each pass.

    Sequences are laid out as [prefix of the host (CLS, registers), prompts, patch tokens].

    Attributes:
        prefix: Leading tokens of the host that are no patches: CLS, registers.
        prompts: Tokens that parts inserted after these. They are never dispatched, counted in a rate, or in a map.
        grid: Rows and columns of the patch tokens; None where there is none.
        frames: Frames of a clip: that many neighbours in the batch belong together. 1 for images.
        padding: (B, patch tokens) bool, those that lie wholly in padding: never dispatched or counted; None is none.
        read: Leading tokens whose result the last block must give; None is all of them.
        decided: What was decided in this pass, by dispatcher; branches tell it, for layers that share a decision.
        unskipped: Whether a branch would have skipped tokens, had gradients been disabled; branches tell it.
        dense: Whether a branch ran all tokens since skipping them would have taken longer; branches tell it.
    """

    prefix: int = 0
    prompts: int = 0
    grid: tuple[int, int] | None = None
    frames: int = 1
    padding: Tensor | None = None
    read: int | None = None
    decided: dict[Hashable, Any] = field(default_factory=dict)
    unskipped: bool = False
    dense: bool = False

    def all_read(self) -> 'TokenState':
        """The same, for a branch whose every result is wanted."""
        return replace(self, read=None)

    def insert(self, x: Tensor, prompts: Tensor) -> Tensor:
        """Put prompts (m, C), or those of each image (B, m, C), into the place of the present ones.

        Where there are none yet, they go behind the prefix.

        Shape:
            x (B, N, C) -> (B, N - present + m, C).
        """
        before, after = x[:, : self.prefix], x[:, self.prefix + self.prompts :]
        self.prompts = prompts.shape[-2]
        return torch.cat([before, prompts.to(x.dtype).expand(x.shape[0], -1, -1), after], dim=1)

    def restore(self, x: Tensor) -> Tensor:
        """The tokens as the host laid them out, without what parts inserted: what its outputs are made of."""
        if not self.prompts:
            return x
        return torch.cat([x[:, : self.prefix], x[:, self.prefix + self.prompts :]], dim=1)
