"""CLIP's own names, which OpenCLIP kept."""

from ..family import CLIP, NUMBER, Family, Kind

TEXT = 'text tower, or its joint space'

CLIP_TOWER = Family(
    kind=Kind('CLIP or OpenCLIP, image tower', CLIP, eps=1e-5, gelu=False, patch_bias=False),
    blocks=rf'transformer\.resblocks\.{NUMBER}\.',
    inside={
        'ln_1': 'norm1',
        'attn.in_proj_weight': 'attn.qkv.weight',
        'attn.in_proj_bias': 'attn.qkv.bias',
        'attn.out_proj': 'attn.proj',
        'ls_1.gamma': 'ls1.gamma',
        'ln_2': 'norm2',
        'mlp.c_fc': 'mlp.fc1',
        'mlp.c_proj': 'mlp.fc2',
        'ls_2.gamma': 'ls2.gamma',
    },
    outside={
        'class_embedding': 'cls_token',
        'positional_embedding': 'pos_embed',
        'conv1': 'patch_embed.proj',
        'ln_pre': 'norm_pre',
        'ln_post': 'norm',
        'proj': 'proj',
    },
    prefixes=('visual.', ''),
    left={
        r'^(text|transformer|token_embedding|ln_final)\.': TEXT,
        r'^(positional_embedding|text_projection|logit_scale|logit_bias)$': TEXT,
        r'^(input_resolution|context_length|vocab_size)$': 'a number of the text tower',
    },
    lifts=dict(cls_token=2, pos_embed=1),
    turned=('proj',),
)
