"""mmpretrain's Vision Transformer with its branches dispatched. No ViT is copied: its layers are adopted."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from mmengine.model import ModuleList
from mmpretrain.models.backbones.vision_transformer import VisionTransformer, resize_pos_embed
from torch import Tensor, nn
from torch.func import functional_call

from mmdyt.core.attaching import add_parts, check_parts, share_decisions
from mmdyt.core.block import Place
from mmdyt.core.padding import padding_of
from mmdyt.core.part import parts as parts_of
from mmdyt.core.rewriting import Rewritable, fold
from mmdyt.core.telling import tell_of
from mmdyt.core.tokens import TokenState
from mmdyt.core.tuning import Tuned, set_tuned
from mmdyt.hosts.mmpretrain import DyTEncoderLayer
from mmdyt.models.part_configs import ADAPTER, DISPATCHER, as_parts, frames_per_clip, part_class, register_parts
from mmdyt.models.registers import Registers
from mmdyt.models.vit_arguments import (
    check_break_even,
    check_host,
    check_own,
    check_registers,
    following,
)
from mmdyt.models.vit_macs import ViTMacs
from mmdyt.registry import MODELS

register_parts()


def _unfold_frames(features: Tensor, num_frames: int) -> Tensor:
    """Features of B x T frames, each (N, C), (C, H, W) or (C,), as those of B clips."""
    clips = features.unflatten(0, (-1, num_frames))
    if features.dim() == 3:
        return clips
    return (clips if features.dim() == 4 else clips[..., None, None]).transpose(1, 2)


@MODELS.register_module()
class DyTVisionTransformer(ViTMacs, Registers, Rewritable, VisionTransformer):
    """Vision Transformer with parts: a frozen base, by default adapters and dispatched MLPs, Dynamic Tuning (DyT).

    Returns exactly what mmpretrain's ``VisionTransformer`` returns, in mmpretrain, mmseg and mmaction2. Masks, logits
    and counts are read through :func:`mmdyt.core.observe.record_dispatch`. Source: arXiv 2403.11808.

    Args:
        arch: As mmpretrain's: a name, or a dict of sizes.
        dispatch: Which branch is dispatched: ``'mlp'``, ``'attn'``, ``'attn_mlp'`` (each with its own adapter and
            dispatcher) or ``'layer'`` (one of each for attention and MLP together).
        adapter: Config of the adapter of each branch; ``dim`` is filled in. None is no adapter.
        dispatcher: Config of the dispatcher of each branch; ``dim`` and ``num_prefix_tokens`` are filled in. None
            dispatches nothing: with an adapter that is the plain parallel adapter (AdaptFormer), without the plain ViT.
        substitute: Config of what inactive tokens get instead of each branch, ``dict(type='mmdyt.MeanUpdate')``;
            ``dim`` is filled in. None is nothing, as in the paper.
        inference: Executor of inference: ``'auto'``, ``'packed'``, ``'fixed'`` or ``'masked'``; see
            :class:`~mmdyt.core.branch.DynamicBranch`.
        training: Executor of training, ``'split'``, ``'masked'``, ``'active_only'`` or
            ``'masked_all_keys'``; see there.
            The cheaper ``'split'`` and ``'active_only'`` need branches that treat each image alike, and each token, or
            attend to all: what has drop path, and attention and whole layers with ``keys='active'``, run ``'masked'``.
        keys: Which tokens active ones attend to where attention is dispatched: the ``'active'`` ones, the paper's, or
            ``'all'``: inactive tokens stay as context (docs/methods.md).
        break_even: Share of active tokens from which on a branch runs all, since skipping would take longer; None is
            never. ``tools/benchmark.py --write-break-even`` measures it.
        decide_per: Which layers decide: each ``'layer'``, the paper's, or one for each ``'level'`` that is read
            (``out_indices``): the layers that feed a level have one map then, the decision of the first of them.
        restore: What patches get as features whose token was merged or dropped, for whoever reads patches: ``'stale'``,
            ``'stale+delta'``, ``'stale+adapter'``, ``'fused'``, ``'knn'`` or ``'merge'``; see docs/methods.md. Nothing
            without such parts.
        skip_unread: For a head that reads the class token only: compute of the last layer what that token needs, exact
            to rounding, in training too. Off, what the paper runs and counts.
        with_cp: Gradient checkpointing: layers run again in the backward pass instead of saving what their gradients
            need. The same gradients for less memory and more time (docs/scale.md).
        num_registers: Registers of the base, R: tokens behind the class token, without positions, which DINOv2 has 4
            of. They belong to the prefix: never dispatched or reduced, in no rate, map or output. They are frozen like
            the rest of the base.
        tuned: Which parameters of the backbone are trained: patterns on their names, or ``'all'``; everything
            else is frozen. See :func:`mmdyt.core.tuning.set_tuned`. By default what the parts declare.
        parts: Configs of more parts, such as ``dict(type='mmdyt.LoRA', on='attn.qkv', rows='qv', rank=8)``. All layers
            get them, or those that ``layers=[...]`` names by index. See docs/methods.md.
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
        inference: str = 'auto',
        training: str = 'split',
        keys: str = 'active',
        break_even: float | None = None,
        decide_per: str = 'layer',
        restore: str = 'stale',
        skip_unread: bool = False,
        with_cp: bool = False,
        num_registers: int = 0,
        tuned: Tuned | None = None,
        parts: Sequence[Mapping] | None = None,
        **vit,
    ):
        parts_given = dict(adapter=adapter, dispatcher=dispatcher, substitute=substitute)
        check_own(
            dispatch, inference, training, keys, break_even, skip_unread, with_cp, decide_per, restore, **parts_given
        )
        check_host(arch, vit)
        check_registers(num_registers, vit.get('with_cls_token', True))
        if isinstance(vit.get('out_indices'), Sequence):
            vit['out_indices'] = list(vit['out_indices'])  # mmpretrain writes into it
        super().__init__(arch, **vit)
        self._add_registers(num_registers)
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
        self._told: set[type[Warning]] = set()
        self._open(dispatch, inference, training, keys, with_cp)
        self.set_break_even(break_even)
        self.frames_per_clip = frames_per_clip(adapter)
        follow = following(self.out_indices, self.num_layers) if decide_per == 'level' else ()
        short = as_parts(dispatch, adapter, dispatcher, substitute, follow, self.num_layers)
        self._add_parts([*short, *(parts or ())])
        share_decisions(self.layers)
        self.restore = restore
        check_parts(self.layers, self.out_type, restore)
        self.skip_unread = skip_unread
        if skip_unread:
            self._check_unread_can_be_skipped()
        set_tuned(self, tuned)
        if training == 'active_only' and any(
            branch.learns() for layer in self.layers for branch in layer.branches().values()
        ):
            raise ValueError(
                "training must not be 'active_only' with dispatchers that are trained, which get no gradient then. "
                "Take 'split', or dispatcher=dict(noise=False, fitted=True)."
            )

    def _open(self, dispatch: str, inference: str, training: str, keys: str, with_cp: bool) -> None:
        """Adopt the layers as blocks, and make room for parts."""
        self.dispatch, self.keys = dispatch, keys
        patch_values = self.patch_embed.projection.weight[0].numel()
        place = Place(self.embed_dims, 0, self.num_layers, self.num_prefix_tokens, patch_values)
        self.layers = ModuleList(
            DyTEncoderLayer(layer, place._replace(index=i), dispatch, inference, training, keys)
            for i, layer in enumerate(self.layers)
        )
        for layer in self.layers:
            layer.with_cp = with_cp
        self.dynamic = _Outside()

    def _add_parts(self, configs: Sequence[Mapping]) -> None:
        """Build the parts that are asked for and attach them, to all layers or to those of ``layers``."""
        kinds = [part_class(config) for config in configs]
        options = [{key: value for key, value in config.items() if key != 'type'} for config in configs]
        add_parts(self.layers, kinds, options, outside=self)

    def paths(self) -> Mapping[str, str]:
        """What parts may rewrite outside the layers: the patch embedding and the final norm."""
        return {'embed.projection': 'patch_embed.projection'} | ({'norm.final': 'ln1'} if self.final_norm else {})

    def _check_unread_can_be_skipped(self) -> None:
        """Refuse ``skip_unread`` where something reads what would be skipped."""
        if self.out_type != 'cls_token' or list(self.out_indices) != [self.num_layers - 1]:
            raise ValueError(
                f"skip_unread must be False unless out_type is 'cls_token' and only the last layer is read, got "
                f'out_type={self.out_type!r}, out_indices={self.out_indices}.'
            )
        last = self.layers[-1]
        if type(last.attn.qkv) is not nn.Linear:
            raise ValueError(
                f'skip_unread must be False unless the projections are nn.Linear, got {type(last.attn.qkv)}.'
            )
        mixing = [branch for site, branch in last.branches().items() if site != 'mlp']
        if any(branch.training_executor == 'masked_all_keys' and branch.keys == 'active' for branch in mixing):
            raise ValueError("skip_unread must be False with training='masked_all_keys', got True.")
        for part in parts_of(last):
            if part.reads_all:
                raise ValueError(
                    f'skip_unread must be False with a {type(part).__name__}, which reads all tokens, got True.'
                )

    def set_break_even(self, break_even: float | None) -> None:
        """Set the share of active tokens from which on a branch runs all of them, in (0, 1]; None is never."""
        check_break_even(break_even)
        for layer in self.layers:
            for branch in layer.branches().values():
                branch.break_even = break_even

    def train(self, mode: bool = True):
        """Set the mode; returns self, as ``nn.Module`` does and mmpretrain's backbone does not."""
        super().train(mode)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features of images, or of clips: their frames are folded into the batch, here or by a 2D recognizer."""
        if x.dim() != 5:
            if x.shape[0] % self.frames_per_clip:
                raise ValueError(
                    f'frames_per_clip must divide the frames of a batch, got {self.frames_per_clip} and {x.shape[0]}.'
                )
            return self._forward_images(x, self.frames_per_clip)
        if self.frames_per_clip not in (1, x.shape[2]):
            raise ValueError(
                f'frames_per_clip must be 1 or the {x.shape[2]} frames of a clip, got {self.frames_per_clip}.'
            )
        features = self._forward_images(x.transpose(1, 2).flatten(0, 1), x.shape[2])
        return tuple(_unfold_frames(level, x.shape[2]) for level in features)

    def _forward_images(self, x: Tensor, frames: int) -> tuple[Tensor, ...]:
        """As mmpretrain's, with a state of the tokens that goes from layer to layer."""
        x, grid = self._embed(x)
        grid = tuple(grid)
        padding = padding_of(x.shape[0], grid, x.device)
        restoring = None if self.out_type == 'cls_token' else self.restore
        state = TokenState(self.num_prefix_tokens, grid=grid, frames=frames, padding=padding, restoring=restoring)
        outs = []
        for i, layer in enumerate(self.layers):
            last = i == self.num_layers - 1
            if last and self.skip_unread:
                state.read = self.num_prefix_tokens  # leading ones: registers are computed along
            x = layer(x, state)
            if i in self.out_indices:
                features = self._without_registers(x if state.read is not None else state.restore(x))
                features = self.call('norm.final', features) if last and self.final_norm else features
                outs.append(self._format_output(features, grid))
        if (state.unskipped or state.dense) and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            tell_of(state, self._told)
        return tuple(outs)

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patch tokens behind the class token, with positions, and their grid; as mmpretrain's."""
        conv, rewrites = self.patch_embed.projection, self.rewrites('embed.projection')
        weight, bias = fold(rewrites, conv.weight, conv.bias)
        tensors = {'projection.weight': weight} | ({} if conv.bias is None else {'projection.bias': bias})
        x, grid = functional_call(self.patch_embed, tensors, (x,)) if rewrites else self.patch_embed(x)
        if conv.bias is None and bias is not None:
            x = x + bias.to(x.dtype)  # a shift that the layer has no place for
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        positions = resize_pos_embed(
            self.pos_embed,
            self.patch_resolution,
            grid,
            mode=self.interpolate_mode,
            num_extra_tokens=self.num_extra_tokens,
        )
        return self.pre_norm(self.drop_after_pos(self._with_registers(x + positions))), grid


class _Outside(nn.ModuleDict):
    """Rooms of the parts outside the layers."""

    def init_weights(self) -> None:
        """Undo what an ``init_cfg`` did to the parts; like every child, before pre-trained weights load."""
        for part in parts_of(self):
            part.reset_parameters()
