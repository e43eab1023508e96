"""Tiny Vision Transformers whose modules are named as libraries name them, on torch alone."""

import torch
import torch.nn as nn
import torch.nn.functional as F

DIM, HEADS, DEPTH, IMAGE, PATCH, CLASSES = 16, 2, 3, 16, 4, 5


def attend(query, key, value):
    heads = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


class TimmAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x):
        return self.proj_drop(self.proj(attend(*self.qkv(x).chunk(3, dim=-1))))


class TimmMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(DIM))

    def forward(self, x):
        return x * self.gamma


class TimmBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.ls1, self.drop_path1 = nn.LayerNorm(DIM), TimmAttention(), Scale(), nn.Identity()
        self.norm2, self.mlp, self.ls2, self.drop_path2 = nn.LayerNorm(DIM), TimmMlp(), Scale(), nn.Identity()

    def forward(self, x):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class PatchEmbed(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name
        self.add_module(name, nn.Conv2d(3, DIM, PATCH, PATCH))

    def forward(self, x):
        return getattr(self, self.name)(x).flatten(2).transpose(1, 2)


class TimmViT(nn.Module):
    """timm's names; a class token is read by a classifier."""

    def __init__(self, block=TimmBlock):
        super().__init__()
        self.num_prefix_tokens = 1
        self.patch_embed = PatchEmbed('proj')
        self.cls_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.pos_embed = nn.Parameter(torch.zeros(1, (IMAGE // PATCH) ** 2 + 1, DIM))
        self.blocks = nn.Sequential(*(block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, CLASSES)

    def forward_features(self, x):
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.norm(self.blocks(x))

    def forward(self, x):
        return self.head(self.forward_features(x)[:, 0])


class HFSelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_attention_heads = HEADS
        self.query, self.key, self.value = (nn.Linear(DIM, DIM) for _ in range(3))
        self.dropout = nn.Dropout(0.0)

    def forward(self, x):
        return attend(self.query(x), self.key(x), self.value(x))


def dense(*widths, **more):
    return nn.ModuleDict(dict(dense=nn.Linear(*widths), **more))


class HFLayer(nn.Module):
    """As in releases 4 of transformers, the older of which gave a tuple."""

    def __init__(self):
        super().__init__()
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        output = dense(DIM, DIM, dropout=nn.Dropout(0.0))
        self.attention = nn.ModuleDict(dict(attention=HFSelfAttention(), output=output))
        self.intermediate = dense(DIM, 2 * DIM, intermediate_act_fn=nn.GELU())
        self.output = dense(2 * DIM, DIM, dropout=nn.Dropout(0.0))

    def forward(self, hidden_states, head_mask=None, output_attentions=False):
        x = hidden_states
        attention, inner = self.attention, self.intermediate
        x = x + attention['output']['dense'](attention['attention'](self.layernorm_before(x)))
        return (x + self.output['dense'](inner['intermediate_act_fn'](inner['dense'](self.layernorm_after(x)))),)


class HFEmbeddings(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.position_embeddings = nn.Parameter(torch.zeros(1, (IMAGE // PATCH) ** 2 + 1, DIM))
        self.patch_embeddings = PatchEmbed('projection')

    def forward(self, x):
        x = self.patch_embeddings(x)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.position_embeddings


class HFModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings, self.encoder = HFEmbeddings(), nn.Module()
        self.encoder.layer = nn.ModuleList(HFLayer() for _ in range(DEPTH))
        self.layernorm = nn.LayerNorm(DIM)

    def forward(self, x):
        x = self.embeddings(x)
        for layer in self.encoder.layer:
            x = layer(x, None, False)[0]
        return self.layernorm(x)


class HFViT(nn.Module):
    """Hugging Face's names, queries, keys and values being linears of their own."""

    def __init__(self):
        super().__init__()
        self.vit, self.classifier = HFModel(), nn.Linear(DIM, CLASSES)

    def forward(self, x):
        return self.classifier(self.vit(x)[:, 0])


VITS = dict(timm=TimmViT, hf=HFViT)


def scrambled(vit: nn.Module, seed: int = 0) -> nn.Module:
    """Random values everywhere: no bias, scale or position may be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in vit.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return vit.eval()


def images(number: int = 2, size: int = IMAGE, seed: int = 1) -> torch.Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(seed))
