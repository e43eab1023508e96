"""torchvision's names, of its two generations of MLPs."""

from ..family import IMAGENET, NUMBER, Family, Kind

TORCHVISION = Family(
    kind=Kind('torchvision ViT', IMAGENET),
    blocks=rf'encoder\.layers\.encoder_layer_{NUMBER}\.',
    inside={
        'ln_1': 'norm1',
        'self_attention.in_proj_weight': 'attn.qkv.weight',
        'self_attention.in_proj_bias': 'attn.qkv.bias',
        'self_attention.out_proj': 'attn.proj',
        'ln_2': 'norm2',
        'mlp.0': 'mlp.fc1',
        'mlp.3': 'mlp.fc2',
        'mlp.linear_1': 'mlp.fc1',
        'mlp.linear_2': 'mlp.fc2',
    },
    outside={
        'class_token': 'cls_token',
        'encoder.pos_embedding': 'pos_embed',
        'conv_proj': 'patch_embed.proj',
        'encoder.ln': 'norm',
        'heads.pre_logits': 'pre_logits.fc',
        'heads.head': 'head',
    },
)
