"""Layouts by names and shapes alone, written out: which is found, and what is printed, without any of the libraries."""

import contextlib
import io
import json
import re

import mmpretrain.models  # noqa: F401  fills the registry
import pytest
import torch
from conftest import load_tool
from mmpretrain.registry import MODELS
from safetensors.torch import save_file

import mmdyt.models  # noqa: F401  fills the registry
from mmdyt.weights.convert import convert
from mmdyt.weights.sizes import gated_width

C, HIDDEN, PATCH, GRID, CLASSES = 24, 40, 4, 3, 5
N = GRID**2


def tower(block, inside, outside, depth=2):
    """Random tensors: shapes by name, a block's behind ``block`` with the number in it."""
    generator = torch.Generator().manual_seed(0)
    shapes = dict(outside) | {block.format(i) + name: shape for i in range(depth) for name, shape in inside.items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def with_biases(**weights):
    """``a_b=(3, 4)`` is a weight of that shape at ``a.b``, and its bias."""
    found = {}
    for name, shape in weights.items():
        found |= {f'{name}.weight': shape, f'{name}.bias': shape[:1]}
    return found


def linears(*names, hidden=HIDDEN):
    """Norms, projections and MLPs of a block, in the order norm, qkv parts ..., proj, norm, fc1, fc2."""
    norm1, *qkv, proj, norm2, fc1, fc2 = names
    width = 3 * C if len(qkv) == 1 else C
    shapes = {norm1: (C,), proj: (C, C), norm2: (C,), fc1: (hidden, C), fc2: (C, hidden)} | {n: (width, C) for n in qkv}
    return with_biases(**shapes)


PATCHES = (C, 3, PATCH, PATCH)
TIMM_BLOCK = linears('norm1', 'attn.qkv', 'attn.proj', 'norm2', 'mlp.fc1', 'mlp.fc2')
TIMM_BASE = with_biases(**{'patch_embed.proj': PATCHES, 'norm': (C,)}) | {'cls_token': (1, 1, C)}
TIMM_OUT = TIMM_BASE | {'pos_embed': (1, N + 1, C)}
SCALES = {'ls1.gamma': (C,), 'ls2.gamma': (C,)}
OLD_SCALES = {'gamma_1': (C,), 'gamma_2': (C,)}
HEAD = with_biases(head=(CLASSES, C))
HF_BASE = {'embeddings.cls_token': (1, 1, C), 'embeddings.position_embeddings': (1, N + 1, C)} | with_biases(
    **{'embeddings.patch_embeddings.projection': PATCHES, 'layernorm': (C,)}
)
HF_QKV = [f'attention.attention.{name}' for name in ('query', 'key', 'value')]
HF_VIT = linears('layernorm_before', *HF_QKV, 'attention.output.dense', 'layernorm_after', 'intermediate.dense',
                 'output.dense')  # fmt: skip
HF_DINO = linears('norm1', *HF_QKV, 'attention.output.dense', 'norm2', 'mlp.fc1', 'mlp.fc2') | {
    'layer_scale1.lambda1': (C,), 'layer_scale2.lambda1': (C,)
}  # fmt: skip
CLIP_BLOCK = linears('ln_1', 'attn.in_proj_', 'attn.out_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj')
CLIP_BLOCK = {name.replace('in_proj_.', 'in_proj_'): shape for name, shape in CLIP_BLOCK.items()}
CLIP_OUT = {
    'class_embedding': (C,), 'positional_embedding': (N + 1, C), 'conv1.weight': PATCHES, 'proj': (C, 7),
} | with_biases(ln_pre=(C,), ln_post=(C,))  # fmt: skip
HF_CLIP = linears('layer_norm1', *(f'self_attn.{n}_proj' for n in 'qkv'), 'self_attn.out_proj', 'layer_norm2',
                  'mlp.fc1', 'mlp.fc2')  # fmt: skip
HF_CLIP_OUT = {
    'embeddings.class_embedding': (C,), 'embeddings.position_embedding.weight': (N + 1, C),
    'embeddings.patch_embedding.weight': PATCHES, 'embeddings.position_ids': (1, N + 1),
} | with_biases(pre_layrnorm=(C,), post_layernorm=(C,))  # fmt: skip
TV = linears('ln_1', 'self_attention.in_proj_', 'self_attention.out_proj', 'ln_2', 'mlp.linear_1', 'mlp.linear_2')
TV = {name.replace('in_proj_.', 'in_proj_'): shape for name, shape in TV.items()}
TV_OUT = {'class_token': (1, 1, C), 'encoder.pos_embedding': (1, N + 1, C)} | with_biases(
    **{'conv_proj': PATCHES, 'encoder.ln': (C,), 'heads.head': (CLASSES, C)}
)
SWIGLU = {
    **with_biases(norm1=(C,), norm2=(C,)), **with_biases(**{'attn.qkv': (3 * C, C), 'attn.proj': (C, C)}),
    **with_biases(**{'mlp.w12': (2 * HIDDEN, C), 'mlp.w3': (C, HIDDEN)}),
}  # fmt: skip
NO_KEY_BIAS = {k: v for k, v in TIMM_BLOCK.items() if k != 'attn.qkv.bias'} | {'attn.q_bias': (C,), 'attn.v_bias': (C,)}


def prefixed(prefix, shapes):
    return {prefix + name: shape for name, shape in shapes.items()}


QUICK = ('--act', 'quick_gelu')
# name -> (state, options, what is printed)
LAYOUTS = {
    'timm': (tower('blocks.{}.', TIMM_BLOCK, TIMM_OUT | HEAD), (), ["ViT under timm's names", 'classes 5']),
    'dinov2': (
        tower('blocks.{}.', TIMM_BLOCK | SCALES, TIMM_OUT | {'mask_token': (1, C), 'register_tokens': (1, 4, C)}), (),
        ['DINOv2 with registers', 'num_registers=4', 'layer_scale_init_value=1e-5', 'mask_token (of masked'],
    ),
    'dinov2 chunks': (tower('blocks.0.{}.', TIMM_BLOCK | SCALES, TIMM_OUT | {'mask_token': (1, C)}), (), ['DINOv2\n']),
    'dinov2 giant': (tower('blocks.{}.', SWIGLU | SCALES, TIMM_OUT), (), ['swiglu_fused', 'feedforward_channels=60']),
    'deit3': (
        tower('blocks.{}.', TIMM_BLOCK | OLD_SCALES, TIMM_BASE | {'pos_embed': (1, N, C)} | HEAD), (), ['DeiT III'],
    ),
    'mae': (
        tower('blocks.{}.', TIMM_BLOCK, TIMM_OUT | {'mask_token': (1, 1, 8), 'decoder_embed.weight': (8, C)}), (),
        ['MAE, pre-training'],
    ),
    'mae fine-tuned': (
        tower('blocks.{}.', TIMM_BLOCK, {k.replace('norm.', 'fc_norm.'): v for k, v in TIMM_OUT.items()} | HEAD), (),
        ["out_type='avg_featmap'", 'final_norm=False', 'MAE, fine-tuned'],
    ),
    'mocov3': (
        tower('module.base_encoder.blocks.{}.', TIMM_BLOCK, prefixed('module.base_encoder.', TIMM_OUT)
              | {'module.base_encoder.head.0.weight': (4, C), 'module.momentum_encoder.cls_token': (1, 1, C)}), (),
        ['MoCo v3', 'num_heads=12', 'projector'],
    ),
    'dino': (
        tower('backbone.blocks.{}.', TIMM_BLOCK, prefixed('backbone.', TIMM_OUT) | {'head.mlp.0.weight': (4, C)}), (),
        ['DINO, pre-training'],
    ),
    'beit': (
        tower('blocks.{}.', NO_KEY_BIAS | OLD_SCALES, TIMM_OUT), (), ['BEiT with absolute', 'layer_scale'],
    ),
    'timm clip': (
        tower('blocks.{}.', TIMM_BLOCK, {k: v for k, v in TIMM_OUT.items() if k != 'patch_embed.proj.bias'}
              | with_biases(norm_pre=(C,))), QUICK, ["CLIP tower under timm's", 'pre_norm=True', 'QuickGELU'],
    ),
    'torchvision': (tower('encoder.layers.encoder_layer_{}.', TV, TV_OUT), (), ['torchvision ViT']),
    'torchvision new': (
        tower('encoder.layers.encoder_layer_{}.', {
            k.replace('linear_1', '0').replace('linear_2', '3'): v for k, v in TV.items()
        }, TV_OUT), (), ['torchvision ViT'],
    ),
    'clip': (
        tower('visual.transformer.resblocks.{}.', CLIP_BLOCK, prefixed('visual.', CLIP_OUT) | {
            'logit_scale': (), 'token_embedding.weight': (9, 8), 'transformer.resblocks.0.ln_1.bias': (8,),
        }), QUICK, ['CLIP or OpenCLIP', 'QuickGELU', 'LinearNeck', 'eps=1e-5'],
    ),
    'clip tower': (tower('transformer.resblocks.{}.', CLIP_BLOCK, CLIP_OUT), ('--act', 'gelu'), ['LinearNeck']),
    'hf vit': (
        tower('vit.encoder.layer.{}.', HF_VIT, prefixed('vit.', HF_BASE) | with_biases(classifier=(CLASSES, C))), (),
        ['Hugging Face ViT', 'eps=1e-12', 'classes 5'],
    ),
    'hf vit model': (
        tower('encoder.layer.{}.', HF_VIT, HF_BASE | with_biases(**{'pooler.dense': (C, C)})), (), ['pooler, which'],
    ),
    'hf dinov2': (
        tower('encoder.layer.{}.', HF_DINO, HF_BASE | {'embeddings.mask_token': (1, C)}), (), ['Hugging Face Dinov2\n'],
    ),
    'hf dinov2 registers': (
        tower('encoder.layer.{}.', HF_DINO, HF_BASE | {'embeddings.register_tokens': (1, 4, C)}), (),
        ['Dinov2 with registers', 'num_registers=4'],
    ),
    'hf clip': (
        tower('vision_model.encoder.layers.{}.', HF_CLIP, prefixed('vision_model.', HF_CLIP_OUT) | {
            'visual_projection.weight': (7, C), 'text_model.x': (1,), 'logit_scale': (),
        }), QUICK, ['Hugging Face CLIP', 'LinearNeck'],
    ),
}  # fmt: skip


def run(src, dst, *options):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        load_tool('convert_vit').main([str(src), str(dst), *options])
    return printed.getvalue()


@pytest.mark.parametrize(('state', 'options', 'said'), LAYOUTS.values(), ids=LAYOUTS)
def test_each_layout_is_found_and_the_printed_model_loads_it_wholly(tmp_path, state, options, said):
    torch.save(state, tmp_path / 'src.pth')
    text = run(tmp_path / 'src.pth', tmp_path / 'dst.pth', *options)
    assert all(part in text for part in said), text
    lines = re.findall(r'^(backbone|neck|head)=(.*)$', text, re.MULTILINE)
    configs = {place: eval(line, dict(YOURS=3)) for place, line in lines}
    configs['backbone'] |= dict(adapter=None, dispatcher=None)
    model = torch.nn.ModuleDict({place: MODELS.build(config) for place, config in configs.items()})
    model.load_state_dict(torch.load(tmp_path / 'dst.pth', weights_only=True)['state_dict'], strict=True)
    assert model['backbone'](torch.randn(1, 3, GRID * PATCH, GRID * PATCH))[-1].shape == (1, C)


@pytest.mark.parametrize(('state', 'options'), [each[:2] for each in LAYOUTS.values()], ids=LAYOUTS)
def test_each_wrong_shape_and_each_missing_tensor_is_refused(state, options):
    """Those that are used; a norm or a scale that is gone from one block, too."""
    state = {name.removeprefix('module.'): tensor for name, tensor in state.items()}
    found = convert(state)
    for name in state.keys() - found.left_out.keys() - {'visual_projection.weight'}:  # of any number of rows
        spoiled = state | {name: torch.cat([state[name], state[name]])}
        with pytest.raises(ValueError, match='must have|must hold'):
            convert(spoiled)
        if re.search(r'[._]1\.', name):
            with pytest.raises(ValueError, match='must hold'):
                convert({key: tensor for key, tensor in state.items() if key != name})


TIMM = LAYOUTS['timm'][0]
REFUSED = {
    'BEiT': (TIMM | {'blocks.0.attn.relative_position_bias_table': torch.ones(3, 3)}, 'BEiT adds a bias'),
    'DINOv3': (TIMM | {'rope_embed.periods': torch.ones(3)}, 'RoPE'),
    'DINOv3 of timm': (
        {k: v for k, v in TIMM.items() if k != 'pos_embed'} | {'reg_token': torch.ones(1, 4, C)}, 'RoPE',
    ),
    'EVA-02': (tower('blocks.{}.', {k: v for k, v in SWIGLU.items() if k != 'attn.qkv.bias'} | {
        'attn.q_bias': (C,), 'attn.v_bias': (C,)}, TIMM_OUT), 'EVA-02'),
    'RoPE ViT': (tower('blocks.{}.', TIMM_BLOCK | OLD_SCALES, TIMM_OUT), 'RoPE'),
    'SigLIP': (TIMM | {'attn_pool.latent': torch.ones(1, 1, C)}, 'SigLIP'),
    'no class token': (
        {k: v for k, v in TIMM.items() if k != 'cls_token'} | {'pos_embed': torch.ones(1, N, C)},
        'without a class token',
    ),
    'a scale in one block': (TIMM | {'blocks.0.ls1.gamma': torch.ones(C)}, 'must hold all'),
    'two names': (TIMM | {'blocks.0.0.norm1.weight': torch.ones(C)}, 'under one name'),
    'two norms': (TIMM | {'fc_norm.weight': torch.ones(C), 'fc_norm.bias': torch.ones(C)}, 'beside them'),
}  # fmt: skip


@pytest.mark.parametrize(('state', 'reason'), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_by_name_and_nothing_written(tmp_path, state, reason):
    torch.save(state, tmp_path / 'src.pth')
    with pytest.raises(SystemExit, match=reason):
        run(tmp_path / 'src.pth', tmp_path / 'dst.pth')
    assert [path.name for path in tmp_path.iterdir()] == ['src.pth']


def test_clip_without_an_activation_is_refused_unless_a_file_beside_it_says(tmp_path):
    torch.save(LAYOUTS['hf clip'][0], tmp_path / 'src.pth')
    src, dst = tmp_path / 'src.pth', tmp_path / 'dst.pth'
    with pytest.raises(SystemExit, match='--act must say which GELU'):
        run(src, dst)
    vision = dict(hidden_size=C, num_hidden_layers=2, num_attention_heads=4, hidden_act='quick_gelu')
    (tmp_path / 'config.json').write_text(json.dumps(dict(vision_config=vision | dict(hidden_size=C + 1))))
    with pytest.raises(SystemExit, match='--act must say which GELU'):  # that of another model
        run(src, dst)
    (tmp_path / 'config.json').write_text(json.dumps(dict(vision_config=vision)))
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(dict(image_mean=[0.5] * 3, image_std=[0.2] * 3)))
    text = run(src, dst)
    assert 'QuickGELU' in text and 'num_heads=4' in text and 'std=[51.0, 51.0, 51.0]' in text
    assert 'read beside: config.json, preprocessor_config.json' in text
    (tmp_path / 'config.json').write_text(json.dumps(dict(vision_config=vision | dict(hidden_act='relu'))))
    with pytest.raises(SystemExit, match='config.json must name an activation'):
        run(src, dst, '--force')


def test_heads_must_divide_the_width(tmp_path):
    torch.save(TIMM, tmp_path / 'src.pth')
    with pytest.raises(SystemExit, match='--num-heads must divide embed_dims 24, got 7'):
        run(tmp_path / 'src.pth', tmp_path / 'dst.pth', '--num-heads', '7')
    assert not (tmp_path / 'dst.pth').exists()


@pytest.mark.parametrize('hidden', [8, 24, 40, 4096])
def test_the_width_of_a_gated_mlp_comes_out_of_mmpretrains_number(hidden):
    from mmpretrain.models.utils import SwiGLUFFNFused

    with torch.device('meta'):
        assert SwiGLUFFNFused(8, gated_width(hidden)).w3.in_features == hidden
    with pytest.raises(ValueError, match='that 8 divides'):
        gated_width(hidden + 1)


# ---- reading


def shards(folder, **changes):
    """The timm model in two files and an index."""
    names = sorted(TIMM)
    files = {'a.safetensors': names[::2], 'b.safetensors': names[1::2]}
    for file, held in files.items():
        save_file({name: TIMM[name] for name in held}, folder / file)
    places = {name: file for file, held in files.items() for name in held}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=places | changes)))
    return folder / 'model.safetensors.index.json'


def test_shards_are_one_model(tmp_path):
    run(shards(tmp_path), tmp_path / 'dst.pth')
    found = torch.load(tmp_path / 'dst.pth', weights_only=True)['state_dict']
    assert all(torch.equal(found[name], tensor) for name, tensor in convert(TIMM).tensors.items())


@pytest.mark.parametrize(
    ('changes', 'reason'),
    [
        ({'head.bias': 'c.safetensors'}, "none named 'c.safetensors'"),
        ({'head.bias': '../a.safetensors'}, 'must name files beside itself'),
        ({'head.bias': '/etc/passwd'}, 'must name files beside itself'),
        ({'new.tensor': 'a.safetensors'}, "a.safetensors must hold 'new.tensor'"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, changes, reason):
    with pytest.raises(SystemExit, match=reason):
        run(shards(tmp_path, **changes), tmp_path / 'dst.pth')
    assert not (tmp_path / 'dst.pth').exists()


def test_an_index_without_a_map_is_refused(tmp_path):
    for content in ('', '[]', '{"weight_map": {}}', '{"weight_map": [1]}'):
        (tmp_path / 'x.index.json').write_text(content)
        with pytest.raises(SystemExit, match='weight_map'):
            run(tmp_path / 'x.index.json', tmp_path / 'dst.pth')


def test_options_of_a_command_beside_weights_are_read_safely(tmp_path):
    """DINO, MAE and MoCo v3 save an ``argparse.Namespace``, which weights_only alone refuses."""
    import argparse

    torch.save(dict(model=TIMM, args=argparse.Namespace(lr=1e-3)), tmp_path / 'src.pth')
    with pytest.raises(Exception, match='Namespace'):
        torch.load(tmp_path / 'src.pth', weights_only=True)
    assert "left out: args (stands beside 'model'" in run(tmp_path / 'src.pth', tmp_path / 'dst.pth')


def test_torchscript_says_what_to_do(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / 'src.pt'))
    with pytest.raises(SystemExit, match='TorchScript archive'):
        run(tmp_path / 'src.pt', tmp_path / 'dst.pth')
