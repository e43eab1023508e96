"""mmpretrain's encoder layer, named as :class:`mmdyt.core.block.Block` wants it."""

from collections.abc import Mapping

import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer
from mmpretrain.models.utils import SwiGLUFFN
from torch import Tensor

from mmdyt.core.block import Block, Place
from mmdyt.core.part import parts


class DyTEncoderLayer(Block, TransformerEncoderLayer):
    """An encoder layer that took over the children of a built mmpretrain layer, under the same names.

    A plain ViT checkpoint thus loads with only ``layers.*.dynamic.*`` missing.

    Args:
        layer: The layer whose children are adopted; not to be used afterwards.
        place: What parts may know of it.
        dispatch: Which branch is dispatched.
        inference: Executor of inference.
        training: Executor of training. ``'split'`` needs branches that treat each token and each image alike:
            attention, whole layers and MLPs with drop path run ``'masked'`` instead.
    """

    def __init__(
        self,
        layer: TransformerEncoderLayer,
        place: Place,
        dispatch: str = 'mlp',
        inference: str = 'packed',
        training: str = 'masked',
    ):
        BaseModule.__init__(self)
        self.embed_dims = layer.embed_dims
        self.ln1, self.attn, self.ln2, self.ffn = layer.ln1, layer.attn, layer.ln2, layer.ffn
        self.num_heads, self.attn_drop = self.attn.num_heads, self.attn.attn_drop
        mixing = 'masked' if training == 'split' else training
        alone = mixing if _drops_paths(self.ffn) else training
        self.open(place, dispatch, inference, dict(attn=mixing, mlp=alone, layer=mixing))

    def init_weights(self) -> None:
        """Initialise like mmpretrain, then undo what an ``init_cfg`` on ``Linear`` did to the new parts.

        Runs before pre-trained weights load, so adapters that a checkpoint does hold are kept.
        """
        super().init_weights()
        for part in parts(self):
            part.reset_parameters()

    def frozen(self) -> Mapping[str, nn.Module]:
        """The modules that can be rewritten, by ``<site>.<name>``."""
        attn = {'attn.norm': self.ln1, 'attn.qkv': self.attn.qkv, 'attn.proj': self.attn.proj, 'mlp.norm': self.ln2}
        return attn | {f'mlp.{name}': module for name, module in _linears(self.ffn).items()}

    def after_attention(self, x: Tensor) -> Tensor:
        """Dropout, layer scale and drop path."""
        return self.attn.out_drop(self.attn.gamma1(self.attn.proj_drop(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        """Mmcv's FFN or mmpretrain's SwiGLU, without the residual connection."""
        ffn = self.ffn
        if isinstance(ffn, SwiGLUFFN):
            gate, value = self.call('mlp.w12', x).chunk(2, dim=-1)
            x = self.call('mlp.w3', ffn.norm(F.silu(gate) * value))
        else:
            names = iter(_linears(ffn))
            for module in _steps(ffn.layers):
                x = self.call(f'mlp.{next(names)}', x) if isinstance(module, nn.Linear) else module(x)
        return ffn.dropout_layer(ffn.gamma2(x))


def _linears(ffn: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of an MLP: ``fc1``, ``fc2``, or of SwiGLU ``w12``, ``w3``."""
    if isinstance(ffn, SwiGLUFFN):
        return dict(w12=ffn.w12, w3=ffn.w3)
    linears = [module for module in _steps(ffn.layers) if isinstance(module, nn.Linear)]
    return {f'fc{i}': module for i, module in enumerate(linears, 1)}


def _steps(layers: nn.Sequential) -> list[nn.Module]:
    """What an FFN runs one after the other; all but its last linear are in groups."""
    return [step for group in layers for step in (group if isinstance(group, nn.Sequential) else [group])]


def _drops_paths(branch: nn.Module) -> bool:
    """Whether a branch is dropped for whole images at random: it must then see which token is whose."""
    return any(isinstance(module, DropPath) and module.drop_prob for module in branch.modules())
