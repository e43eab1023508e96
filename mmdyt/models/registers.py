"""Registers of a frozen base: tokens behind the class token, without positions. R registers, C width."""

import torch
import torch.nn as nn
from torch import Tensor


class Registers:
    """Mixin that puts registers into the sequence of mmpretrain's ``VisionTransformer``, and takes them out again.

    Source: Vision Transformers Need Registers (Darcet et al., arXiv 2309.16588).

    Attributes:
        register_tokens: (1, R, C); None where there are none.
        num_prefix_tokens: The class token and the registers.
    """

    num_extra_tokens: int
    embed_dims: int

    def _add_registers(self, number: int) -> None:
        """Make room for them, with start values for a base that has none."""
        tokens = nn.Parameter(torch.zeros(1, number, self.embed_dims)) if number else None
        if tokens is not None:
            nn.init.trunc_normal_(tokens, std=0.02)  # as positions
        self.register_parameter('register_tokens', tokens)
        self.num_prefix_tokens = self.num_extra_tokens + number

    def _with_registers(self, x: Tensor) -> Tensor:
        """[CLS, patches] -> [CLS, registers, patches]."""
        if self.register_tokens is None:
            return x
        registers = self.register_tokens.expand(x.shape[0], -1, -1)
        return torch.cat((x[:, : self.num_extra_tokens], registers, x[:, self.num_extra_tokens :]), dim=1)

    def _without_registers(self, x: Tensor) -> Tensor:
        """[CLS, registers, patches] -> [CLS, patches], what hosts expect."""
        if self.register_tokens is None:
            return x
        return torch.cat((x[:, : self.num_extra_tokens], x[:, self.num_prefix_tokens :]), dim=1)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """As mmpretrain's, for learning rates by layer; registers enter with the class token."""
        if param_name == f'{prefix}register_tokens':
            param_name = f'{prefix}cls_token'
        return super().get_layer_depth(param_name, prefix)
