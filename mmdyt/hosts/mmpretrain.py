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
from mmdyt.core.rewriting import at


class DyTEncoderLayer(Block, TransformerEncoderLayer):
    """An encoder layer that took over the children of a built mmpretrain layer, under the same names.

    A plain ViT checkpoint thus loads with only ``layers.*.dynamic.*`` missing.

    Args:
        layer: The layer whose children are adopted; not to be used afterwards.
        place: What parts may know of it.
        dispatch: Which branch is dispatched.
        inference: Executor of inference.
        training: Executor of training. ``'split'`` and ``'active_only'`` need branches that treat each image alike, and
            each token, or attend to all: what has drop path, and attention and whole layers with ``keys='active'``, run
            ``'masked'`` instead.
        keys: Which tokens active ones attend to.
    """

    def __init__(
        self,
        layer: TransformerEncoderLayer,
        place: Place,
        dispatch: str = 'mlp',
        inference: str = 'auto',
        training: str = 'masked',
        keys: str = 'active',
    ):
        BaseModule.__init__(self)
        self.embed_dims = layer.embed_dims
        self.ln1, self.attn, self.ln2, self.ffn = layer.ln1, layer.attn, layer.ln2, layer.ffn
        self.num_heads, self.attn_drop = self.attn.num_heads, self.attn.attn_drop
        _plain_rates(self)
        self._ffn_steps = _ffn_steps(self.ffn)
        attn = {'attn.norm': 'ln1', 'attn.qkv': 'attn.qkv', 'attn.proj': 'attn.proj', 'mlp.norm': 'ln2'}
        self._paths = attn | {f'mlp.{name}': path for name, path in self._ffn_steps if name}
        whole = 'masked' if training in ('split', 'active_only') else training
        mixes = keys == 'active'
        executors = dict(
            attn=whole if mixes or _drops_paths(self.attn) else training,
            mlp=whole if _drops_paths(self.ffn) else training,
            layer=whole if mixes or _drops_paths(self) else training,
        )
        self.open(place, dispatch, inference, executors, keys)

    def init_weights(self) -> None:
        """Initialise like mmpretrain, then undo what an ``init_cfg`` on ``Linear`` did to the new parts.

        Runs before pre-trained weights load, so adapters that a checkpoint does hold are kept.
        """
        super().init_weights()
        for part in parts(self):
            part.reset_parameters()

    def paths(self) -> Mapping[str, str]:
        """Where the modules are that can be rewritten, by ``<site>.<name>``."""
        return self._paths

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
            for name, path in self._ffn_steps:
                x = self.call(f'mlp.{name}', x) if name else at(self, path)(x)
        return ffn.dropout_layer(ffn.gamma2(x))


def _ffn_steps(ffn: nn.Module) -> list[tuple[str, str]]:
    """What an MLP runs one after the other: names of its linears, ``fc1``, ``fc2``, '' for others, and their paths."""
    if isinstance(ffn, SwiGLUFFN):
        return [('w12', 'ffn.w12'), ('w3', 'ffn.w3')]
    steps, linears = [], 0
    for i, group in enumerate(ffn.layers):  # all but the last linear are in groups with what follows them
        inner = group if isinstance(group, nn.Sequential) else None
        for j, module in enumerate([group] if inner is None else inner):
            linears += isinstance(module, nn.Linear)
            name = f'fc{linears}' if isinstance(module, nn.Linear) else ''
            steps.append((name, f'ffn.layers.{i}' if inner is None else f'ffn.layers.{i}.{j}'))
    return steps


def _plain_rates(layer: nn.Module) -> None:
    """Make the rates of drop path Python's numbers: mmpretrain has NumPy's, on which ``torch.compile`` stumbles."""
    for module in layer.modules():
        if isinstance(module, DropPath):
            module.drop_prob = float(module.drop_prob)


def _drops_paths(branch: nn.Module) -> bool:
    """Whether a branch is dropped for whole images at random: it must then see which token is whose."""
    return any(isinstance(module, DropPath) and module.drop_prob for module in branch.modules())
