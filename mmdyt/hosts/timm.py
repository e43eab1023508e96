"""timm's ``VisionTransformer``, and whoever names things as it does (DeiT, DINO, DINOv2, MAE). timm is not imported."""

import torch.nn as nn

from .library import Host, found_at
from .named import Attention, FeedForward, Names

NAMES = Names(
    norms=(('norm1', 'norm2'),),
    attentions=(Attention(('attn.qkv',), 'attn.proj', 'attn.num_heads', ('attn.attn_drop',)),),
    mlps=(
        FeedForward('mlp.fc1', 'mlp.fc2', 'mlp.act', inner=('mlp.drop1', 'mlp.norm')),
        FeedForward('mlp.fc1_x', 'mlp.fc2', 'mlp.act', gate='mlp.fc1_g', inner=('mlp.drop1', 'mlp.norm')),
        FeedForward('mlp.w12', 'mlp.w3', None),
    ),
    # one drop path for both branches: DINO's
    after_attention=('attn.proj_drop', 'ls1', 'drop_path1', 'drop_path'),
    after_mlp=('mlp.drop2', 'mlp.drop', 'ls2', 'drop_path2', 'drop_path'),
)


def host_of(vit: nn.Module) -> Host | None:
    """What is to be known of a network of this kind; None if it is of another.

    Raises:
        ValueError: If it has what its layers would be told beside tokens.
    """
    layers, patch = getattr(vit, 'blocks', None), found_at(vit, ('patch_embed.proj',))
    if not (isinstance(layers, nn.Sequential | nn.ModuleList) and isinstance(patch, nn.Conv2d)):
        return None
    for name in ('rope', 'rel_pos_bias', 'shared_rel_pos'):
        if getattr(vit, name, None) is not None:
            raise ValueError(f'vit must have layers that read tokens alone, got one with {name}.')
    if getattr(vit, 'grad_checkpointing', False):
        raise ValueError('grad_checkpointing must be off in a network that is adapted, got True. Take with_cp=True.')
    prefix = getattr(vit, 'num_prefix_tokens', None)
    if prefix is None:
        registers = found_at(vit, ('reg_token', 'register_tokens'))
        prefix = sum(getattr(vit, name, None) is not None for name in ('cls_token', 'dist_token'))
        prefix += 0 if registers is None else registers.shape[1]
    return Host(layers, NAMES, patch, prefix, r'^head(_dist)?\.')
