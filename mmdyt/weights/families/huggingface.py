"""Hugging Face's names: of the files, and those that transformers 5 gives in memory."""

from ..family import CLIP, HALF, IMAGENET, NUMBER, Family, Kind

POOLER = 'pooler, which the backbone has no place for'
EMBEDDINGS = {
    'embeddings.cls_token': 'cls_token',
    'embeddings.position_embeddings': 'pos_embed',
    'embeddings.patch_embeddings.projection': 'patch_embed.proj',
    'layernorm': 'norm',
}
ATTENTION = {
    'attention.attention.query': 'attn.q',
    'attention.attention.key': 'attn.k',
    'attention.attention.value': 'attn.v',
    'attention.output.dense': 'attn.proj',
    'attention.q_proj': 'attn.q',
    'attention.k_proj': 'attn.k',
    'attention.v_proj': 'attn.v',
    'attention.o_proj': 'attn.proj',
}

HF_VIT = Family(
    kind=Kind("Hugging Face ViT (Google's; DINO and MAE came here too, with ImageNet's pixels)", HALF, eps=1e-12),
    blocks=rf'(?:encoder\.layer|layers)\.{NUMBER}\.',
    inside=ATTENTION
    | {
        'layernorm_before': 'norm1',
        'layernorm_after': 'norm2',
        'intermediate.dense': 'mlp.fc1',
        'output.dense': 'mlp.fc2',
        'mlp.fc1': 'mlp.fc1',
        'mlp.fc2': 'mlp.fc2',
        'lambda_1': 'ls1.gamma',
        'lambda_2': 'ls2.gamma',
    },
    outside=EMBEDDINGS | {'pooler.layernorm': 'fc_norm', 'classifier': 'head'},
    prefixes=('vit.', 'deit.', 'beit.', ''),
    beside={'classifier': 'head'},
    left={
        r'(^|\.)pooler\.dense\.': POOLER,
        r'^decoder\.': 'decoder of pre-training',
        r'(^|\.)(mask_token|lm_head\.weight|lm_head\.bias)$': 'of masked pre-training',
    },
    kinds={
        r'^decoder\.': Kind('Hugging Face ViTMAE, pre-training', IMAGENET, eps=1e-12),
        r'\.lambda_1$': Kind('Hugging Face BEiT with absolute positions', HALF, eps=1e-12),
        r'^deit\.': Kind('Hugging Face DeiT', IMAGENET, eps=1e-12),
    },
)

HF_DINOV2 = Family(
    kind=Kind('Hugging Face Dinov2', IMAGENET),
    blocks=rf'(?:encoder\.layer|layers)\.{NUMBER}\.',
    inside=ATTENTION
    | {
        'norm1': 'norm1',
        'norm2': 'norm2',
        'layer_scale1.lambda1': 'ls1.gamma',
        'layer_scale2.lambda1': 'ls2.gamma',
        'mlp.fc1': 'mlp.fc1',
        'mlp.fc2': 'mlp.fc2',
        'mlp.weights_in': 'mlp.w12',
        'mlp.weights_out': 'mlp.w3',
    },
    outside=EMBEDDINGS | {'embeddings.register_tokens': 'reg_token'},
    prefixes=('dinov2.', 'dinov2_with_registers.', ''),
    left={
        r'mask_token$': 'of masked pre-training',
        r'^classifier\.': 'reads class token and mean patch together, which no head of mmpretrain does',
    },
    kinds={r'register_tokens$': Kind('Hugging Face Dinov2 with registers', IMAGENET)},
)

HF_CLIP = Family(
    kind=Kind('Hugging Face CLIP, image tower', CLIP, eps=1e-5, gelu=False, patch_bias=False),
    blocks=rf'encoder\.layers\.{NUMBER}\.',
    inside={
        'layer_norm1': 'norm1',
        'layer_norm2': 'norm2',
        'self_attn.q_proj': 'attn.q',
        'self_attn.k_proj': 'attn.k',
        'self_attn.v_proj': 'attn.v',
        'self_attn.out_proj': 'attn.proj',
        'mlp.fc1': 'mlp.fc1',
        'mlp.fc2': 'mlp.fc2',
    },
    outside={
        'embeddings.class_embedding': 'cls_token',
        'embeddings.position_embedding.weight': 'pos_embed',
        'embeddings.patch_embedding': 'patch_embed.proj',
        'pre_layrnorm': 'norm_pre',  # sic
        'post_layernorm': 'norm',
    },
    prefixes=('vision_model.', ''),
    beside={'visual_projection.weight': 'proj'},
    left={
        r'position_ids$': 'a count of places',
        r'^(text_model|text_projection)\.|^logit_scale$': 'text tower, or its joint space',
        r'^classifier\.': 'reads the mean patch, which no backbone of a class token gives',
    },
    lifts=dict(cls_token=2, pos_embed=1),
)
