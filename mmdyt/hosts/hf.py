"""Hugging Face's ViT, DeiT, Dinov2 (with registers) and CLIP's image tower. transformers is not imported.

Releases 4 and 5 name things differently; both are in the table.
"""

import torch.nn as nn

from .library import Host, found_at
from .named import Attention, FeedForward, Names


def _attention(at: str, proj: str, heads: str, dropout: str) -> Attention:
    return Attention(tuple(f'{at}.{row}_proj' for row in 'qkv'), f'{at}.{proj}', f'{at}.{heads}', (f'{at}.{dropout}',))


NAMES = Names(
    norms=(('layernorm_before', 'layernorm_after'), ('norm1', 'norm2'), ('layer_norm1', 'layer_norm2')),
    attentions=(
        _attention('attention', 'o_proj', 'num_attention_heads', 'attention_dropout'),
        _attention('self_attn', 'out_proj', 'num_heads', 'dropout'),
        Attention(
            tuple(f'attention.attention.{row}' for row in ('query', 'key', 'value')),
            'attention.output.dense',
            'attention.attention.num_attention_heads',
            ('attention.attention.dropout_prob', 'attention.attention.dropout'),
        ),
    ),
    mlps=(
        FeedForward('mlp.fc1', 'mlp.fc2', 'mlp.activation_fn'),
        FeedForward('mlp.fc1', 'mlp.fc2', 'mlp.activation'),
        FeedForward('mlp.up_proj', 'mlp.down_proj', 'mlp.act_fn', gate='mlp.gate_proj'),
        FeedForward('mlp.weights_in', 'mlp.weights_out', None),
        FeedForward('intermediate.dense', 'output.dense', 'intermediate.intermediate_act_fn'),
    ),
    after_attention=('attention.output.dropout', 'dropout', 'layer_scale1', 'drop_path'),
    after_mlp=('output.dropout', 'dropout', 'layer_scale2', 'drop_path'),
)
# where networks with a head keep the one without
BASES = ('vit', 'deit', 'dinov2', 'dinov2_with_registers', 'vision_model')
LAYERS = ('encoder.layer', 'encoder.layers', 'layers', 'layer')
PATCH = ('patch_embeddings.projection', 'patch_embedding')


def host_of(vit: nn.Module) -> Host | None:
    """What is to be known of a network of this kind; None if it is of another.

    Raises:
        ValueError: If it turns queries and keys by their place, or checkpoints gradients.
    """
    base = found_at(vit, BASES)
    base = vit if base is None else base
    embeddings, layers = getattr(base, 'embeddings', None), found_at(base, LAYERS)
    if isinstance(embeddings, nn.Module) and found_at(base, ('rope_embeddings', 'rotary_emb')) is not None:
        raise ValueError('vit must have layers that read tokens alone, got one with rotary positions.')
    if not (isinstance(embeddings, nn.Module) and isinstance(layers, nn.ModuleList)):
        return None
    patch = found_at(embeddings, PATCH)
    if not isinstance(patch, nn.Conv2d):
        return None
    if any(getattr(layer, 'gradient_checkpointing', False) for layer in layers):
        raise ValueError(
            'gradient_checkpointing must be off in a network that is adapted, got True. Take with_cp=True.'
        )
    singles = ('cls_token', 'class_embedding', 'distillation_token')
    prefix = sum(getattr(embeddings, name, None) is not None for name in singles)
    registers = getattr(embeddings, 'register_tokens', None)
    prefix += 0 if registers is None else registers.shape[1]
    return Host(layers, NAMES, patch, prefix, r'^(\w+_)?classifier\.')
