"""Parts and a layer on torch and mmdyt.core alone, for the tests of core and of parts. B images, N tokens, C width."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmdyt.core.attention import Layout
from mmdyt.core.block import Block, Place
from mmdyt.core.dispatch import Dispatch, gumbel_sigmoid, hard_mask, straight_through
from mmdyt.core.part import Delta, Dispatcher


class Update(Delta):
    """A linear update of every token beside a branch."""

    word = 'update'

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor, state=None) -> Tensor:
        return self.linear(x)

    def macs_per_token(self) -> int:
        return self.linear.weight.numel()


class Gate(Dispatcher):
    """A random linear score of each patch token: active above 0, in training by chance."""

    def __init__(self, dim: int, num_prefix_tokens: int = 1):
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.linear = nn.Linear(dim, 1, bias=False)
        nn.init.normal_(self.linear.weight)

    def forward(self, x: Tensor, state=None) -> Dispatch:
        if self.training:
            return self.sample(x, state)
        logits = self._score(x, state)
        return self._dispatch(hard_mask(logits, torch.zeros(())), logits, state)

    def sample(self, x: Tensor, state=None) -> Dispatch:
        logits = self._score(x, state)
        return self._dispatch(straight_through(gumbel_sigmoid(logits, 1.0)), logits, state)

    def _prefix(self, state) -> int:
        return self.num_prefix_tokens + (0 if state is None else state.prompts)

    def _score(self, x: Tensor, state) -> Tensor:
        return self.linear(x[:, self._prefix(state) :])

    def _dispatch(self, mask: Tensor, logits: Tensor, state) -> Dispatch:
        prefix = self._prefix(state)
        return Dispatch(F.pad(mask, (0, 0, prefix, 0), value=1.0), logits, prefix)

    def macs_per_token(self) -> int:
        return self.linear.weight.numel()


class Fixed(Dispatcher):
    """Active tokens chosen by the test."""

    num_prefix_tokens = 1

    def __init__(self, mask: Tensor):
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor, state=None) -> Dispatch:
        return Dispatch(self.mask, None, 1)


class MLP(nn.Sequential):
    """A branch that knows of the layout only which leading tokens are wanted, as MLPs do."""

    def __init__(self, dim: int):
        super().__init__(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        return super().forward(x if layout is None else layout.queries(x))


class PlainLayer(Block):
    """A layer of a Vision Transformer, pre-norm, with an MLP of two linear layers."""

    def __init__(
        self,
        dim: int = 16,
        hidden: int = 32,
        dispatch: str = 'mlp',
        inference: str = 'auto',
        training: str = 'masked',
        prefix: int = 1,
        keys: str = 'active',
    ):
        super().__init__()
        self.num_heads, self.attn_drop = 2, 0.0
        self.ln1, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ln2, self.fc1, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        place = Place(dim, index=0, depth=1, prefix=prefix, patch_values=3 * 4 * 4)
        self.open(place, dispatch, inference, dict.fromkeys(('attn', 'mlp', 'layer'), training), keys)

    def paths(self) -> dict[str, str]:
        attn = {'attn.norm': 'ln1', 'attn.qkv': 'qkv', 'attn.proj': 'proj'}
        return attn | {'mlp.norm': 'ln2', 'mlp.fc1': 'fc1', 'mlp.fc2': 'fc2'}

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.call('mlp.fc2', F.gelu(self.call('mlp.fc1', x)))
