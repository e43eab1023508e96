"""mmpretrain's Vision Transformer with its branches dispatched. No ViT is copied: its layers are adopted."""

from collections.abc import Sequence

import torch.nn as nn
from mmengine.model import BaseModule, ModuleList
from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer, VisionTransformer
from torch import Tensor

from mmdyt.core.adapter import Adapter
from mmdyt.core.branch import DynamicBranch
from mmdyt.core.dispatcher import TokenDispatcher
from mmdyt.core.macs import ViTSize, linear_weights
from mmdyt.core.tuning import Tuned, set_tuned
from mmdyt.registry import MODELS

MODELS.register_module(module=Adapter)
MODELS.register_module(module=TokenDispatcher)

DISPATCH = ('mlp',)


class DyTEncoderLayer(TransformerEncoderLayer):
    """An encoder layer that took over the children of a built mmpretrain layer, under the same names.

    A plain ViT checkpoint thus loads with only ``layers.*.dynamic.*`` missing.

    Args:
        layer: The layer whose children are adopted; not to be used afterwards.
        mlp: The dispatched MLP branch.
    """

    def __init__(self, layer: TransformerEncoderLayer, mlp: DynamicBranch):
        BaseModule.__init__(self)
        self.embed_dims = layer.embed_dims
        self.ln1, self.attn, self.ln2, self.ffn = layer.ln1, layer.attn, layer.ln2, layer.ffn
        self.ffn.add_identity = False  # the dynamic branch adds the residual, once
        self.dynamic = nn.ModuleDict(dict(mlp=mlp))

    def init_weights(self) -> None:
        """Initialise like mmpretrain, then undo what an ``init_cfg`` on ``Linear`` did to the new parts.

        Runs before pre-trained weights load, so adapters that a checkpoint does hold are kept.
        """
        super().init_weights()
        for branch in self.dynamic.values():
            branch.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = x + self.attn(self.ln1(x))
        return self.dynamic['mlp'](x, self.mlp)

    def mlp(self, x: Tensor) -> Tensor:
        """The frozen MLP branch without its residual connection, (B, N, C) -> (B, N, C)."""
        return self.ffn(self.ln2(x))


@MODELS.register_module()
class DyTVisionTransformer(VisionTransformer):
    """Vision Transformer with Dynamic Tuning (DyT): frozen base, adapters, dispatched MLPs.

    Returns exactly what mmpretrain's ``VisionTransformer`` returns, in mmpretrain, mmseg and mmaction2. Masks, logits
    and counts are read through :func:`mmdyt.core.branch.record_dispatch`. Source: arXiv 2403.11808.

    Args:
        dispatch: Which branch is dispatched: ``'mlp'``.
        adapter: Config of the adapter of each branch; ``dim`` is filled in.
        dispatcher: Config of the dispatcher of each branch; ``dim`` and ``num_prefix_tokens`` are filled in.
        inference: Executor of inference, ``'packed'`` or ``'masked'``; see
            :class:`~mmdyt.core.branch.DynamicBranch`.
        tuned: Which parameters of the backbone are trained: patterns on their names, or ``'all'``; everything
            else is frozen. See :func:`mmdyt.core.tuning.set_tuned`.
        **vit: Arguments of mmpretrain's ``VisionTransformer`` (``arch``, ``img_size``, ``out_indices``,
            ``out_type``, ``final_norm``, ``drop_path_rate`` ...), but ``frozen_stages``.

    Shape:
        (B, 3, H, W) -> tuple over ``out_indices`` of what ``out_type`` says. Any H, W: position embeddings are
        interpolated, the image is padded to whole patches.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        dispatch: str = 'mlp',
        adapter: dict | None = None,
        dispatcher: dict | None = None,
        inference: str = 'packed',
        tuned: Tuned = ('adapter', 'dispatcher'),
        **vit,
    ):
        if dispatch not in DISPATCH:
            raise ValueError(f'dispatch must be one of {DISPATCH}, got {dispatch!r}.')
        if 'frozen_stages' in vit:
            raise ValueError(
                f'frozen_stages must not be set, got {vit["frozen_stages"]}. Choose what is trained with tuned=...'
            )
        if isinstance(vit.get('out_indices'), Sequence):
            vit['out_indices'] = list(vit['out_indices'])  # mmpretrain writes into it
        super().__init__(**vit)
        if max(self.out_indices) >= self.num_layers:
            raise ValueError(f'out_indices must lie below the depth {self.num_layers}, got {self.out_indices}.')
        adapter = dict(type='mmdyt.Adapter') | (adapter or {}) | dict(dim=self.embed_dims)
        dispatcher = (
            dict(type='mmdyt.TokenDispatcher')
            | (dispatcher or {})
            | dict(dim=self.embed_dims, num_prefix_tokens=self.num_extra_tokens)
        )
        self.dispatch = dispatch
        self.layers = ModuleList(
            DyTEncoderLayer(layer, DynamicBranch(MODELS.build(adapter), MODELS.build(dispatcher), inference))
            for layer in self.layers
        )
        set_tuned(self, tuned)

    def train(self, mode: bool = True):
        """Set the mode; returns self, as ``nn.Module`` does and mmpretrain's backbone does not."""
        super().train(mode)
        return self

    def num_patches(self, height: int, width: int) -> int:
        """Patch tokens N of an image of ``height`` x ``width`` pixels, padding included."""
        conv, pad = self.patch_embed.projection, self.patch_embed.adaptive_padding
        pad_h, pad_w = pad.get_pad_shape((height, width)) if pad else (0, 0)
        sides = zip((height + pad_h, width + pad_w), conv.kernel_size, conv.stride, conv.padding, strict=True)
        rows, columns = ((side + 2 * p - k) // s + 1 for side, k, s, p in sides)
        return rows * columns

    def size(self) -> ViTSize:
        """What :func:`mmdyt.core.macs.vit_macs` must know of this backbone."""
        layer, branch = self.layers[0], self.layers[0].dynamic['mlp']
        return ViTSize(
            dim=self.embed_dims,
            patch_weights=self.patch_embed.projection.weight[0].numel(),
            attn_weights=linear_weights(layer.attn),
            mlp_weights=linear_weights(layer.ffn),
            adapter_weights=branch.adapter.macs_per_token(),
            dispatcher_weights=branch.dispatcher.macs_per_token(),
            num_prefix_tokens=self.num_extra_tokens,
            extra_norms=int(self.final_norm) + int(not isinstance(self.pre_norm, nn.Identity)),
        )
