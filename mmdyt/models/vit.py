"""mmpretrain's Vision Transformer with its branches dispatched. No ViT is copied: its layers are adopted."""

import warnings
from collections.abc import Sequence

import torch.nn as nn
from mmengine.model import BaseModule, ModuleList
from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer, VisionTransformer
from torch import Tensor

from mmdyt.core.adapter import Adapter, MoEAdapter
from mmdyt.core.attention import DENSE, Layout, attend
from mmdyt.core.branch import DynamicBranch
from mmdyt.core.dispatcher import TokenDispatcher
from mmdyt.core.macs import Count, ViTSize, dense_vit_macs, linear_weights, vit_macs
from mmdyt.core.tuning import Tuned, set_tuned
from mmdyt.registry import MODELS

for part in (Adapter, MoEAdapter, TokenDispatcher):
    MODELS.register_module(module=part)

# which branches of a layer are dispatched, by the names of the paper's variants
DISPATCH = dict(mlp=('mlp',), attn=('attn',), attn_mlp=('attn', 'mlp'), layer=('layer',))


class DyTEncoderLayer(TransformerEncoderLayer):
    """An encoder layer that took over the children of a built mmpretrain layer, under the same names.

    A plain ViT checkpoint thus loads with only ``layers.*.dynamic.*`` missing.

    Args:
        layer: The layer whose children are adopted; not to be used afterwards.
        dynamic: The dispatched branches by name: ``mlp``, ``attn``, both, or ``layer``.
    """

    def __init__(self, layer: TransformerEncoderLayer, dynamic: dict[str, DynamicBranch]):
        BaseModule.__init__(self)
        self.embed_dims = layer.embed_dims
        self.ln1, self.attn, self.ln2, self.ffn = layer.ln1, layer.attn, layer.ln2, layer.ffn
        self.ffn.add_identity = False  # residuals are added here, once
        self.dynamic = nn.ModuleDict(dynamic)

    def init_weights(self) -> None:
        """Initialise like mmpretrain, then undo what an ``init_cfg`` on ``Linear`` did to the new parts.

        Runs before pre-trained weights load, so adapters that a checkpoint does hold are kept.
        """
        super().init_weights()
        for branch in self.dynamic.values():
            branch.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        if 'layer' in self.dynamic:
            return self.dynamic['layer'](x, self.whole_layer)
        x = self.dynamic['attn'](x, self.attention) if 'attn' in self.dynamic else x + self.attention(x, DENSE)
        return self.dynamic['mlp'](x, self.mlp) if 'mlp' in self.dynamic else x + self.mlp(x, DENSE)

    def attention(self, x: Tensor, layout: Layout) -> Tensor:
        """The frozen attention branch without its residual connection, among the tokens that ``layout`` allows."""
        x, attn = self.ln1(x), self.attn
        if layout is DENSE:
            return attn(x)
        batch, tokens, _ = x.shape
        query, key, value = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = attend(query, key, value, layout, attn.attn_drop if self.training else 0.0)
        x = attn.proj(x.transpose(1, 2).reshape(batch, tokens, -1))
        return attn.out_drop(attn.gamma1(attn.proj_drop(x)))

    def mlp(self, x: Tensor, layout: Layout) -> Tensor:
        """The frozen MLP branch without its residual connection, (B, N, C) -> (B, N, C)."""
        return self.ffn(self.ln2(x))

    def whole_layer(self, x: Tensor, layout: Layout) -> Tensor:
        """Attention and MLP as one branch: what the layer adds to ``x``.

        paper silent: the residual of layer dispatch. An inactive token keeps ``x``, so the outer residual is added
        once, outside; the MLP reads ``x`` plus the attention's update, as it does in the plain layer.
        """
        update = self.attention(x, layout)
        return update + self.mlp(x + update, layout)


@MODELS.register_module()
class DyTVisionTransformer(VisionTransformer):
    """Vision Transformer with Dynamic Tuning (DyT): frozen base, adapters, dispatched MLPs or attention.

    Returns exactly what mmpretrain's ``VisionTransformer`` returns, in mmpretrain, mmseg and mmaction2. Masks, logits
    and counts are read through :func:`mmdyt.core.branch.record_dispatch`. Source: arXiv 2403.11808.

    Args:
        arch: As mmpretrain's: a name, or a dict of sizes.
        dispatch: Which branch is dispatched: ``'mlp'``, ``'attn'``, ``'attn_mlp'`` (each with its own adapter and
            dispatcher) or ``'layer'`` (one of each for attention and MLP together).
        adapter: Config of the adapter of each branch; ``dim`` is filled in.
        dispatcher: Config of the dispatcher of each branch; ``dim`` and ``num_prefix_tokens`` are filled in.
        inference: Executor of inference, ``'packed'`` or ``'masked'``; see
            :class:`~mmdyt.core.branch.DynamicBranch`.
        training_keys: What attention sees in training, ``'active'`` or ``'all'`` tokens; see there.
        tuned: Which parameters of the backbone are trained: patterns on their names, or ``'all'``; everything
            else is frozen. See :func:`mmdyt.core.tuning.set_tuned`.
        **vit: Arguments of mmpretrain's ``VisionTransformer`` (``img_size``, ``out_indices``,
            ``out_type``, ``final_norm``, ``drop_path_rate`` ...), but ``frozen_stages``.

    Shape:
        (B, 3, H, W) -> tuple over ``out_indices`` of what ``out_type`` says. Any H, W: position embeddings are
        interpolated, the image is padded to whole patches.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        arch: str | dict = 'base',
        *,
        dispatch: str = 'mlp',
        adapter: dict | None = None,
        dispatcher: dict | None = None,
        inference: str = 'packed',
        training_keys: str = 'active',
        tuned: Tuned = ('adapter', 'dispatcher'),
        **vit,
    ):
        if dispatch not in DISPATCH:
            raise ValueError(f'dispatch must be one of {list(DISPATCH)}, got {dispatch!r}.')
        if 'frozen_stages' in vit:
            raise ValueError(
                f'frozen_stages must not be set, got {vit["frozen_stages"]}. Choose what is trained with tuned=...'
            )
        if isinstance(vit.get('out_indices'), Sequence):
            vit['out_indices'] = list(vit['out_indices'])  # mmpretrain writes into it
        super().__init__(arch, **vit)
        if max(self.out_indices) >= self.num_layers:
            raise ValueError(f'out_indices must lie below the depth {self.num_layers}, got {self.out_indices}.')
        if max(self.out_indices) < self.num_layers - 1:
            warnings.warn(
                f'out_indices {self.out_indices} leave the layers after {max(self.out_indices)} unread: they run all '
                'the same, and distributed training needs find_unused_parameters=True.',
                stacklevel=2,
            )
        adapter = dict(type='mmdyt.Adapter') | (adapter or {}) | dict(dim=self.embed_dims)
        dispatcher = (
            dict(type='mmdyt.TokenDispatcher')
            | (dispatcher or {})
            | dict(dim=self.embed_dims, num_prefix_tokens=self.num_extra_tokens)
        )
        self.dispatch = dispatch

        def branch() -> DynamicBranch:
            return DynamicBranch(MODELS.build(adapter), MODELS.build(dispatcher), inference, training_keys)

        self.layers = ModuleList(
            DyTEncoderLayer(layer, {name: branch() for name in DISPATCH[dispatch]}) for layer in self.layers
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
        """What the closed form of :mod:`mmdyt.core.macs` must know of this backbone."""
        layer = self.layers[0]
        adapters = [branch.adapter for branch in layer.dynamic.values()]
        return ViTSize(
            dim=self.embed_dims,
            patch_weights=self.patch_embed.projection.weight[0].numel(),
            attn_weights=linear_weights(layer.attn),
            mlp_weights=linear_weights(layer.ffn),
            adapter_weights=sum(adapter.macs_per_token() for adapter in adapters),
            dispatcher_weights=sum(branch.dispatcher.macs_per_token() for branch in layer.dynamic.values()),
            adapter_macs_per_image=sum(adapter.macs_per_image() for adapter in adapters),
            num_prefix_tokens=self.num_extra_tokens,
            extra_norms=int(self.final_norm) + int(not isinstance(self.pre_norm, nn.Identity)),
            pooled_norms=int(self.out_type == 'avg_featmap') * len(self.out_indices),
        )

    def macs(self, height: int, width: int, active: dict[str, Count]) -> Count:
        """MACs of an image of ``height`` x ``width`` pixels.

        Args:
            height: Pixels.
            width: Pixels.
            active: Active tokens incl. prefix of each dispatched branch by module name, e.g.
                ``layers.0.dynamic.mlp``; a tensor holds one count per image.
        """
        size, patches = self.size(), self.num_patches(height, width)
        tokens = patches + size.num_prefix_tokens

        def count(i: int, kind: str) -> Count:
            return active.get(f'layers.{i}.dynamic.{kind}', active.get(f'layers.{i}.dynamic.layer', tokens))

        return vit_macs(size, patches, [(count(i, 'attn'), count(i, 'mlp')) for i in range(self.num_layers)])

    def dense_macs(self, height: int, width: int) -> float:
        """MACs of the plain ViT on an image of ``height`` x ``width`` pixels: no dispatchers, no adapters."""
        return dense_vit_macs(self.size(), self.num_patches(height, width), self.num_layers)
