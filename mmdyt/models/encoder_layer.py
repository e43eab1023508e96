"""mmpretrain's encoder layer with its branches dispatched: the order of things in a block."""

import torch.nn as nn
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer
from torch import Tensor

from mmdyt.core.attention import DENSE, Layout, attend, dot_product_attention
from mmdyt.core.branch import DynamicBranch
from mmdyt.core.executors import Branch


class DyTEncoderLayer(TransformerEncoderLayer):
    """An encoder layer that took over the children of a built mmpretrain layer, under the same names.

    A plain ViT checkpoint thus loads with only ``layers.*.dynamic.*`` missing.

    Args:
        layer: The layer whose children are adopted; not to be used afterwards.
        dynamic: The dispatched or adapted branches by name: ``mlp``, ``attn``, both, or ``layer``; none is the plain
            layer.
        read: Leading tokens whose result is wanted, (B, read, C); None is all. What the others alone need is then not
            computed, but for what dispatchers need of them in training, for the rate loss.
    """

    def __init__(self, layer: TransformerEncoderLayer, dynamic: dict[str, DynamicBranch], read: int | None = None):
        BaseModule.__init__(self)
        self.embed_dims = layer.embed_dims
        self.ln1, self.attn, self.ln2, self.ffn = layer.ln1, layer.attn, layer.ln2, layer.ffn
        self.ffn.add_identity = False  # residuals are added here, once
        if self.attn.scaled_dot_product_attention is F.scaled_dot_product_attention:
            self.attn.scaled_dot_product_attention = dot_product_attention
        self.dynamic = nn.ModuleDict(dynamic)
        self.read = read

    def init_weights(self) -> None:
        """Initialise like mmpretrain, then undo what an ``init_cfg`` on ``Linear`` did to the new parts.

        Runs before pre-trained weights load, so adapters that a checkpoint does hold are kept.
        """
        super().init_weights()
        for branch in self.dynamic.values():
            branch.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C), or (B, read, C)."""
        if 'layer' in self.dynamic:
            return self.dynamic['layer'](x, self.whole_layer, self.read)
        x = self._add('attn', self.attention, x, None if self._mlp_dispatcher_learns() else self.read)
        return self._add('mlp', self.mlp, x, self.read)

    def _mlp_dispatcher_learns(self) -> bool:
        """Whether the rate loss will ask the MLP's dispatcher about every token, read or not."""
        if not self.training or 'mlp' not in self.dynamic or self.dynamic['mlp'].complete:
            return False
        dispatcher = self.dynamic['mlp'].dispatcher
        return dispatcher is not None and any(parameter.requires_grad for parameter in dispatcher.parameters())

    def _add(self, name: str, branch: Branch, x: Tensor, read: int | None) -> Tensor:
        """Tokens plus the update of a branch, dispatched or not."""
        return (
            self.dynamic[name](x, branch, read) if name in self.dynamic else x[:, :read] + branch(x, Layout(read=read))
        )

    def attention(self, x: Tensor, layout: Layout) -> Tensor:
        """The frozen attention branch without its residual connection, among the tokens that ``layout`` allows."""
        x, attn = self.ln1(x), self.attn
        if layout.dense:
            return attn(x)
        wanted = layout.queries(x)
        batch, tokens, _ = wanted.shape
        if layout.read is None:
            query, key, value = self._heads(attn.qkv(x))
        else:
            queries, others = zip(*(p.tensor_split([self.embed_dims]) for p in attn.qkv.parameters()), strict=True)
            (query,) = self._heads(F.linear(wanted, *queries))
            key, value = self._heads(F.linear(x, *others))
        x = attend(query, key, value, layout, attn.attn_drop if self.training else 0.0)
        x = attn.proj(x.transpose(1, 2).reshape(batch, tokens, -1))
        return attn.out_drop(attn.gamma1(attn.proj_drop(x)))

    def _heads(self, projected: Tensor) -> Tensor:
        """Some of queries, keys and values of all heads: (B, N, parts * C) -> (parts, B, H, N, D)."""
        return projected.unflatten(-1, (-1, self.attn.num_heads, self.attn.head_dims)).permute(2, 0, 3, 1, 4)

    def mlp(self, x: Tensor, layout: Layout) -> Tensor:
        """The frozen MLP branch without its residual connection, (B, N, C) -> (B, N, C)."""
        return self.ffn(self.ln2(layout.queries(x)))

    def whole_layer(self, x: Tensor, layout: Layout) -> Tensor:
        """Attention and MLP as one branch: what the layer adds to ``x``.

        paper silent: the residual of layer dispatch. An inactive token keeps ``x``, so the outer residual is added
        once, outside; the MLP reads ``x`` plus the attention's update, as it does in the plain layer.
        """
        update = self.attention(x, layout)
        return update + self.mlp(layout.queries(x) + update, DENSE)
