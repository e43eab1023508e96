"""timm's names, which DINO, DINOv2, MAE, MoCo v3, DeiT and DeiT III, and BEiT took over or gave."""

from ..family import CLIP, IMAGENET, NUMBER, Family, Kind, same

MASK = 'of masked pre-training'
PROJECTOR = 'projector or predictor of pre-training'

TIMM = Family(
    kind=Kind("ViT under timm's names (AugReg, DeiT, DINO, or an encoder of MAE or MoCo v3)"),
    blocks=rf'blocks\.(?:[0-9]+\.)?{NUMBER}\.',  # DINOv2 trains in chunks of blocks: blocks.<chunk>.<i>
    inside=same('norm1', 'norm2', 'attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2', 'mlp.w12', 'mlp.w3')
    | same('ls1.gamma', 'ls2.gamma')
    | {'gamma_1': 'ls1.gamma', 'gamma_2': 'ls2.gamma', 'attn.q_bias': 'attn.q.bias', 'attn.v_bias': 'attn.v.bias'},
    outside=same('cls_token', 'pos_embed', 'reg_token', 'patch_embed.proj', 'norm_pre', 'norm', 'fc_norm', 'head')
    | {'pre_logits.fc': 'pre_logits.fc', 'register_tokens': 'reg_token'},
    prefixes=('', 'backbone.', 'base_encoder.', 'visual.trunk.'),
    left={
        r'^head_dist\.': 'distillation head',
        r'(^|\.)(mask_token|masked_embed)$': MASK,
        r'^(decoder_|decoder\.)': 'decoder of pre-training',
        r'^((base_encoder|backbone)\.)?head\.([0-9]|mlp|last_layer)': PROJECTOR,
        r'^(momentum_encoder|predictor|dino_head|ibot_head|dino_loss|ibot_patch_loss)\.': PROJECTOR,
        r'^(text\.|transformer\.|token_embedding\.|ln_final\.|visual\.head\.)': 'text tower, or its joint space',
        r'^(positional_embedding|text_projection|logit_scale|logit_bias)$': 'text tower, or its joint space',
    },
    kinds={
        r'^base_encoder\.': Kind('MoCo v3', IMAGENET, heads=12),  # ViT-S has 12 heads there
        r'^decoder_(embed|blocks)\.': Kind('MAE, pre-training', IMAGENET),
        r'(^|\.)norm_pre\.': Kind("CLIP tower under timm's names", CLIP, eps=1e-5, gelu=False, patch_bias=False),
        r'q_bias$': Kind('BEiT with absolute positions', IMAGENET),
        r'(^|\.)fc_norm\.': Kind('MAE, fine-tuned, or the like: the mean patch is read', IMAGENET),
        r'(reg_token|register_tokens)$': Kind('DINOv2 with registers', IMAGENET),
        r'(^|\.)mask_token$': Kind('DINOv2', IMAGENET),
        r'\.mlp\.(w12|w3)\.': Kind('DINOv2', IMAGENET),
        r'\.ls1\.gamma$': Kind('DINOv2 or DeiT III', IMAGENET),
        r'\.gamma_1$': Kind('DeiT III', IMAGENET),
        r'^backbone\.': Kind('DINO, pre-training', IMAGENET),
        r'^head\.(mlp|last_layer)\.': Kind('DINO', IMAGENET),
    },
)
