"""mmpretrain's Vision Transformer with its branches dispatched. No ViT is copied: its layers are adopted."""

import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch.nn as nn
from mmcv.cnn.bricks import DropPath
from mmengine.model import ModuleList
from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer, VisionTransformer
from torch import Tensor

from mmdyt.core.adapter import Adapter, MoEAdapter
from mmdyt.core.branch import INFERENCE, TRAINING, DynamicBranch, dynamic_branches
from mmdyt.core.dispatcher import RandomDispatcher, SampleDispatcher, TokenDispatcher
from mmdyt.core.macs import Count, ViTSize, dense_vit_macs, linear_weights, vit_macs
from mmdyt.core.substitute import MeanUpdate
from mmdyt.core.tuning import Tuned, set_tuned
from mmdyt.models.encoder_layer import DyTEncoderLayer
from mmdyt.registry import MODELS

for part in (Adapter, MoEAdapter, TokenDispatcher, SampleDispatcher, RandomDispatcher, MeanUpdate):
    MODELS.register_module(module=part)

ADAPTER = MappingProxyType(dict(type='mmdyt.Adapter'))
DISPATCHER = MappingProxyType(dict(type='mmdyt.TokenDispatcher'))

# which branches of a layer are dispatched, by the names of the paper's variants
DISPATCH = dict(mlp=('mlp',), attn=('attn',), attn_mlp=('attn', 'mlp'), layer=('layer',))


def _drops_paths(branch: nn.Module) -> bool:
    """Whether a branch is dropped for whole images at random: it must then see which token is whose."""
    return any(isinstance(m, DropPath) and m.drop_prob for m in branch.modules())


def _unfold_frames(features: Tensor, num_frames: int) -> Tensor:
    """Features of B x T frames, each (N, C), (C, H, W) or (C,), as those of B clips."""
    clips = features.unflatten(0, (-1, num_frames))
    if features.dim() == 3:
        return clips
    return (clips if features.dim() == 4 else clips[..., None, None]).transpose(1, 2)


@MODELS.register_module()
class DyTVisionTransformer(VisionTransformer):
    """Vision Transformer with Dynamic Tuning (DyT): frozen base, adapters, dispatched MLPs or attention.

    Returns exactly what mmpretrain's ``VisionTransformer`` returns, in mmpretrain, mmseg and mmaction2. Masks, logits
    and counts are read through :func:`mmdyt.core.branch.record_dispatch`. Source: arXiv 2403.11808.

    Args:
        arch: As mmpretrain's: a name, or a dict of sizes.
        dispatch: Which branch is dispatched: ``'mlp'``, ``'attn'``, ``'attn_mlp'`` (each with its own adapter and
            dispatcher) or ``'layer'`` (one of each for attention and MLP together).
        adapter: Config of the adapter of each branch; ``dim`` is filled in. None is no adapter.
        dispatcher: Config of the dispatcher of each branch; ``dim`` and ``num_prefix_tokens`` are filled in. None
            dispatches nothing: with an adapter that is the plain parallel adapter (AdaptFormer), without the plain ViT.
        substitute: Config of what inactive tokens get instead of each branch, ``dict(type='mmdyt.MeanUpdate')``;
            ``dim`` is filled in. None is nothing, as in the paper.
        inference: Executor of inference, ``'packed'`` or ``'masked'``; see
            :class:`~mmdyt.core.branch.DynamicBranch`.
        training: Executor of training, ``'split'``, ``'masked'`` or ``'masked_all_keys'``; see there. ``'split'``, the
            cheaper ``'masked'``, needs branches that treat each token and each image alike: attention, whole layers
            and MLPs with drop path run ``'masked'`` instead.
        skip_unread: For a head that reads the class token only: compute of the last layer what that token needs, exact
            to rounding, in training too. Off, what the paper runs and counts.
        tuned: Which parameters of the backbone are trained: patterns on their names, or ``'all'``; everything
            else is frozen. See :func:`mmdyt.core.tuning.set_tuned`. By default adapters, dispatchers and substitutes,
            where there are any.
        **vit: Arguments of mmpretrain's ``VisionTransformer`` (``img_size``, ``out_indices``,
            ``out_type``, ``final_norm``, ``drop_path_rate`` ...), but ``frozen_stages``.

    Shape:
        (B, 3, H, W) -> tuple over ``out_indices`` of what ``out_type`` says. Any H, W: position embeddings are
        interpolated, the image is padded to whole patches. Clips (B, 3, T, H, W) run frame by frame, each entry being
        what mmaction2's 3D recognizers expect: (B, T, N, C) of ``out_type='raw'``, else (B, C, T, H, W), or
        (B, C, T, 1, 1) where a frame has one feature.

    Raises:
        ValueError: If an argument is out of range, or clips have not the frames that a ``MoEAdapter`` mixes.
    """

    def __init__(
        self,
        arch: str | dict = 'base',
        *,
        dispatch: str = 'mlp',
        adapter: Mapping | None = ADAPTER,
        dispatcher: Mapping | None = DISPATCHER,
        substitute: Mapping | None = None,
        inference: str = 'packed',
        training: str = 'split',
        skip_unread: bool = False,
        tuned: Tuned | None = None,
        **vit,
    ):
        if dispatch not in DISPATCH:
            raise ValueError(f'dispatch must be one of {list(DISPATCH)}, got {dispatch!r}.')
        for name, part in dict(adapter=adapter, dispatcher=dispatcher, substitute=substitute).items():
            if not (part is None or isinstance(part, Mapping)):
                raise ValueError(f'{name} must be a config or None, got {part!r}.')
        if training not in TRAINING:
            raise ValueError(f'training must be one of {list(TRAINING)}, got {training!r}.')
        if inference not in INFERENCE:
            raise ValueError(f'inference must be one of {list(INFERENCE)}, got {inference!r}.')
        if not isinstance(skip_unread, bool):
            raise ValueError(f'skip_unread must be True or False, got {skip_unread!r}.')
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
        if substitute is not None and dispatcher is None:
            raise ValueError(f'substitute must be None without a dispatcher, got {substitute!r}.')
        self.dispatch = dispatch
        width = dict(dim=self.embed_dims)
        adapter = adapter if adapter is None else ADAPTER | adapter | width
        if dispatcher is not None:
            dispatcher = DISPATCHER | dispatcher | width | dict(num_prefix_tokens=self.num_extra_tokens)
        parts = dict(adapter=adapter, dispatcher=dispatcher, substitute=substitute and substitute | width)
        self.layers = ModuleList(self._adopt(layer, parts, inference, training) for layer in self.layers)
        self.skip_unread = skip_unread
        if skip_unread:
            self._check_unread_can_be_skipped()
            self.layers[-1].read = self.num_extra_tokens
        set_tuned(self, self._added_parts() if tuned is None else tuned)

    def _adopt(
        self, layer: TransformerEncoderLayer, parts: dict[str, dict | None], inference: str, training: str
    ) -> DyTEncoderLayer:
        """The dynamic layer made of a plain one, each branch with parts of its own."""
        dynamic = {}
        for kind in DISPATCH[self.dispatch] if any(parts.values()) else ():
            each_token_alone = kind == 'mlp' and not _drops_paths(layer.ffn)
            dynamic[kind] = DynamicBranch(
                inference=inference,
                training='masked' if training == 'split' and not each_token_alone else training,
                **{name: part and MODELS.build(part) for name, part in parts.items()},
            )
        return DyTEncoderLayer(layer, dynamic)

    def _added_parts(self) -> list[str]:
        """Patterns of the parameters that Dynamic Tuning added, as far as there are any."""
        names = [name for name, _ in self.named_parameters()]
        return [part for part in ('adapter', 'dispatcher', 'substitute') if any(f'.{part}.' in name for name in names)]

    def _check_unread_can_be_skipped(self) -> None:
        """Refuse ``skip_unread`` where something reads what would be skipped."""
        if self.out_type != 'cls_token' or list(self.out_indices) != [self.num_layers - 1]:
            raise ValueError(
                f"skip_unread must be False unless out_type is 'cls_token' and only the last layer is read, got "
                f'out_type={self.out_type!r}, out_indices={self.out_indices}.'
            )
        if type(self.layers[-1].attn.qkv) is not nn.Linear:
            raise ValueError(
                f'skip_unread must be False unless the projections are nn.Linear, got {type(self.layers[-1].attn.qkv)}.'
            )
        if any(branch.training_executor == 'masked_all_keys' for branch in self.layers[-1].dynamic.values()):
            raise ValueError("skip_unread must be False with training='masked_all_keys', got True.")
        adapters = [branch.adapter for branch in self.layers[-1].dynamic.values()]
        if any(isinstance(adapter, MoEAdapter) for adapter in adapters):
            raise ValueError('skip_unread must be False with a MoEAdapter, whose router reads all tokens, got True.')

    def train(self, mode: bool = True):
        """Set the mode; returns self, as ``nn.Module`` does and mmpretrain's backbone does not."""
        super().train(mode)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features of images, or of clips: their frames are folded into the batch."""
        if x.dim() != 5:
            return super().forward(x)
        mixed = {m.frames_per_clip for m in self.modules() if isinstance(m, MoEAdapter)}
        if not mixed <= {1, x.shape[2]}:
            raise ValueError(f'frames_per_clip must be 1 or the {x.shape[2]} frames of a clip, got {max(mixed)}.')
        features = super().forward(x.transpose(1, 2).flatten(0, 1))
        return tuple(_unfold_frames(level, x.shape[2]) for level in features)

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
        branches = layer.dynamic.values()
        adapters = [branch.adapter for branch in branches if branch.adapter is not None]
        dispatchers = {name: b.dispatcher.macs_per_token() for name, b in dynamic_branches(layer).items()}
        return ViTSize(
            dim=self.embed_dims,
            patch_weights=self.patch_embed.projection.weight[0].numel(),
            attn_weights=linear_weights(layer.attn),
            mlp_weights=linear_weights(layer.ffn),
            adapter_weights=sum(adapter.macs_per_token() for adapter in adapters),
            dispatcher_weights=sum(dispatchers.values()),
            attn_dispatcher_weights=sum(n for name, n in dispatchers.items() if not name.endswith('mlp')),
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
        read = size.num_prefix_tokens if self.skip_unread else None

        def count(i: int, kind: str) -> Count:
            return active.get(f'layers.{i}.dynamic.{kind}', active.get(f'layers.{i}.dynamic.layer', tokens))

        active = [(count(i, 'attn'), count(i, 'mlp')) for i in range(self.num_layers)]
        return vit_macs(size, patches, active, read=read)

    def dense_macs(self, height: int, width: int) -> float:
        """MACs of the plain ViT on an image of ``height`` x ``width`` pixels: no dispatchers, no adapters."""
        return dense_vit_macs(self.size(), self.num_patches(height, width), self.num_layers)
