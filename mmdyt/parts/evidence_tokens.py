"""The tokens that a fit found to matter go on; the others become one. B images, N tokens incl. M patches, C width."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from mmdyt.core.gate import gate_logits, set_gate
from mmdyt.core.macs import Count
from mmdyt.core.options import check_switches
from mmdyt.core.tokens import TokenState

from .sparse_tokens import SparseTokens

TINY = 1e-9  # attention whose logarithm says nothing


class EvidenceTokens(SparseTokens):
    """Token sparsification by a fitted gate: the patch tokens stay whose loss would cost most.

    One linear score per token, the predicted logarithm of its evidence; the best stay. A fit sets it from data
    (:func:`mmdyt.core.fit.token_evidence.fit_token_gates`). Where the others become their sum, their weights are the
    softmax of the scores over all patch tokens.

    # differs from paper: Sparse-Tuning (arXiv 2405.14700) and EViT keep what the class token attends to.

    Args:
        dim: C.
        keep_rate: As of :class:`~mmdyt.parts.sparse_tokens.SparseTokens`.
        fuse: Likewise.
        num_prefix_tokens: Likewise.
        attention: Whether the gate reads, beside the token, the logarithm of the attention that Sparse-Tuning goes by.

    Shape:
        As there.

    Raises:
        ValueError: If an argument is out of range, or attention is dispatched: only attention among all tokens tells
            what each is worth as a key.
    """

    word = 'evidence_tokens'

    def __init__(
        self, dim: int, keep_rate: float = 0.7, fuse: str = 'sum', num_prefix_tokens: int = 1, attention: bool = False
    ):
        super().__init__(dim, keep_rate, fuse, num_prefix_tokens)
        check_switches(attention=attention)
        self.reads_attention = attention
        self.gate = nn.Linear(dim + attention, 1)
        self.reset_parameters()

    def attach(self, block: Any) -> None:
        """Take the room at its step of a block that dispatches no attention."""
        if block.dispatch != 'mlp':
            raise ValueError(f"dispatch must be 'mlp' with EvidenceTokens, got {block.dispatch!r}.")
        super().attach(block)

    def reset_parameters(self) -> None:
        """Truncated normal (std 0.02) weight, zero bias."""
        nn.init.trunc_normal_(self.gate.weight, std=0.02)
        nn.init.zeros_(self.gate.bias)

    def tuned_parameters(self) -> Iterable[nn.Parameter]:
        """None: the gate is fitted."""
        return ()

    def set_gate(self, weight: Tensor, bias: Tensor) -> None:
        """Set the gate to weights (C,) and a bias."""
        set_gate(self.gate, weight, bias)

    def inputs(self, x: Tensor, state: TokenState) -> Tensor:
        """What the gate reads of each patch token, (B, M, C) or (B, M, C + 1)."""
        patches = x[:, state.first :]
        if not self.reads_attention:
            return patches
        attention = super().scores(x, state).clamp(min=TINY).log()
        return torch.cat([patches.to(attention.dtype), attention.unsqueeze(-1)], dim=-1)

    def scores(self, x: Tensor, state: TokenState) -> Tensor:
        """Share (B, M) of each patch token in the evidence that the gate predicts, in fp32."""
        logits = gate_logits(self.gate, self.inputs(x, state)).squeeze(-1)
        if state.padding is not None:
            logits = logits.masked_fill(state.padding, torch.finfo(logits.dtype).min)
        return logits.softmax(dim=1)

    def macs(self, tokens: Count, prefix: int, carried: int = 0) -> Count:
        """What Sparse-Tuning costs, the gate, and without attention no scores of it."""
        patches = tokens - prefix
        attention = super().macs(tokens, prefix, carried) if self.reads_attention else self.sum_macs(patches, carried)
        return attention + self.some_leave(patches) * patches * self.gate.in_features

    def extra_repr(self) -> str:
        """Show the options in ``print(model)``."""
        return f'{super().extra_repr()}, attention={self.reads_attention}'
