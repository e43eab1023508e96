"""Weights that the libraries themselves make and save: converted, they give the features of the original to 1e-5.

The extra ``weights`` brings the libraries, in an environment of its own: mmaction2 1.2.0 cannot be imported beside
transformers 5, so nothing here imports it.
"""

import contextlib
import io
import re

import mmpretrain.models  # noqa: F401  fills the registry
import pytest
import torch
from conftest import load_tool
from mmpretrain.registry import MODELS

import mmdyt.models  # noqa: F401  fills the registry

DIM, HEADS, PATCH, IMAGE, CLASSES = 24, 3, 4, 12, 5
TIMM = dict(embed_dim=DIM, depth=2, num_heads=HEADS, img_size=IMAGE, patch_size=PATCH, num_classes=CLASSES)
HF = dict(hidden_size=DIM, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=40, image_size=IMAGE,
          patch_size=PATCH)  # fmt: skip
IMAGENET, HALF, CLIP = '[123.675, ', '[127.5, ', '[122.77'


def scrambled(model):
    """Random values everywhere: no bias, scale or position may be left out unnoticed."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def images():
    return torch.randn(2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(1))


def converted(src, tmp_path, *options):
    """The model that the printed configuration builds, loaded without a tensor missing, and what was printed."""
    dst = tmp_path / 'dst.pth'
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        load_tool('convert_vit').main([str(src), str(dst), *options])
    text = printed.getvalue()
    config = {
        place: eval(re.search(rf'^{place}=(.*)$', text, re.MULTILINE)[1], dict(YOURS=HEADS))
        for place in ('backbone', 'neck', 'head')
        if f'\n{place}=' in text
    }
    config['backbone'] |= dict(adapter=None, dispatcher=None)
    model = torch.nn.ModuleDict({place: MODELS.build(part) for place, part in config.items()})
    model.load_state_dict(torch.load(dst, weights_only=True)['state_dict'], strict=True)
    return model.eval(), text


def check(found, expected):
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))


def saved(state, tmp_path, name='src.pth'):
    torch.save(state, tmp_path / name)
    return tmp_path / name


# ---- timm

TIMM_MODELS = {
    'vit': ('vit_base_patch16_224', {}, (), ["ViT under timm's names", 'data_preprocessor: weights do not say']),
    'no qkv bias': ('vit_base_patch16_224', dict(qkv_bias=False), (), ['qkv_bias=False']),
    'mean patch': ('vit_base_patch16_224', dict(global_pool='avg'), (), ["out_type='avg_featmap'", 'fine-tuned']),
    'deit3': ('deit3_small_patch16_224', {}, (), ['DeiT III', 'layer_scale_init_value=1e-5', IMAGENET]),
    'dinov2': ('vit_small_patch14_dinov2', {}, (), ['DINOv2', 'layer_scale_init_value=1e-5', IMAGENET]),
    'dinov2 giant': ('vit_giant_patch14_dinov2', {}, (), ["ffn_type='swiglu_fused'"]),
    'dinov2 registers': ('vit_small_patch14_reg4_dinov2', {}, (), ['num_registers=4', 'DINOv2 with registers']),
    'registers with positions': ('vit_small_patch14_reg4_dinov2', dict(no_embed_class=False), (), ['num_registers=4']),
    'clip': ('vit_base_patch16_clip_224', {}, ('--act', 'gelu'), ['pre_norm=True', 'eps=1e-5', CLIP]),
    'clip quick': ('vit_base_patch16_clip_quickgelu_224', {}, ('--act', 'quick_gelu'), ['QuickGELU']),
    'beit absolute': (
        'beit_base_patch16_224', dict(use_abs_pos_emb=True, use_rel_pos_bias=False, global_pool='token'), (), ['BEiT']
    ),
    'beit mean': ('beit_base_patch16_224', dict(use_abs_pos_emb=True, use_rel_pos_bias=False), (), ['avg_featmap']),
}  # fmt: skip


@pytest.fixture
def timm():
    return pytest.importorskip('timm', reason='the extra weights is not installed')


@pytest.mark.parametrize(('name', 'changes', 'options', 'said'), TIMM_MODELS.values(), ids=TIMM_MODELS)
@torch.no_grad()
def test_timm_models_compute_the_same(timm, tmp_path, name, changes, options, said):
    theirs = scrambled(timm.create_model(name, **TIMM | changes))
    model, text = converted(saved(theirs.state_dict(), tmp_path), tmp_path, *options)
    assert all(part in text for part in said), text
    features = model['backbone'](images())
    tokens = theirs.forward_features(images())
    check(features[-1], theirs.forward_head(tokens, pre_logits=True))
    check(model['head'](features), theirs(images()))
    if 'out_type' not in text:
        model['backbone'].out_type = 'raw'
        prefix = theirs.num_prefix_tokens if hasattr(theirs, 'num_prefix_tokens') else 1
        check(model['backbone'](images())[-1], torch.cat([tokens[:, :1], tokens[:, prefix:]], dim=1))


@pytest.mark.parametrize(
    ('name', 'reason'),
    [
        ('vit_small_patch16_dinov3', 'RoPE'),
        ('eva02_tiny_patch14_224', 'EVA-02'),
        ('beit_base_patch16_224', 'BEiT adds a bias for each pair'),
        ('vit_base_patch16_siglip_224', 'SigLIP'),
        ('vit_base_patch16_gap_224', 'without a class token'),
        ('deit_base_distilled_patch16_224', 'distilled DeiT'),
        ('swin_tiny_patch4_window7_224', 'Swin'),
        ('resnet18', 'convolutional'),
    ],
)
def test_timm_models_that_are_no_plain_vit_are_refused_by_name(timm, tmp_path, name, reason):
    vit = {} if name.startswith(('swin', 'resnet')) else TIMM
    src = saved(timm.create_model(name, **vit).state_dict(), tmp_path)
    with pytest.raises(SystemExit, match=reason):
        converted(src, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['src.pth']


def test_what_leaves_no_trace_in_weights_is_refused_by_the_config_beside_them(timm, tmp_path):
    name = 'vit_base_patch16_rope_ape_224'
    src = saved(timm.create_model(name, **TIMM).state_dict(), tmp_path)
    (tmp_path / 'config.json').write_text(f'{{"architecture": "{name}"}}')
    with pytest.raises(SystemExit, match='no ViT with RoPE'):
        converted(src, tmp_path)


MASK, DECODER = torch.zeros(1, DIM), {'decoder_embed.weight': torch.zeros(8, DIM), 'decoder_blocks.0.x': torch.zeros(1)}
HOSTS = {  # from timm's names to those of who took them over
    'dino teacher': ('vit_base_patch16_224', lambda s: {
        'student': {}, 'teacher': {f'backbone.{k}': v for k, v in s.items()} | {'head.mlp.0.weight': MASK}, 'epoch': 3
    }, 'DINO, pre-training'),
    'mae': ('vit_base_patch16_224', lambda s: {
        'model': s | DECODER | {'mask_token': MASK, 'decoder_pos_embed': MASK}
    }, 'MAE, pre-training'),
    'mocov3': ('vit_base_patch16_224', lambda s: {'state_dict': {
        f'module.base_encoder.{k}': v for k, v in s.items()
    } | {f'module.momentum_encoder.{k}': v for k, v in s.items()} | {
        'module.base_encoder.head.0.weight': MASK, 'module.base_encoder.head.1.num_batches_tracked': torch.tensor(3),
        'module.predictor.0.weight': MASK}}, 'MoCo v3'),
    'dinov2': ('vit_small_patch14_dinov2', lambda s: s | {'mask_token': MASK}, 'layout: DINOv2\n'),
    'dinov2 chunks': ('vit_small_patch14_dinov2', lambda s: {
        re.sub(r'^blocks\.(\d)\.', r'blocks.\1.\1.', k): v for k, v in s.items()
    } | {'mask_token': MASK}, 'layout: DINOv2\n'),
    'dinov2 giant': ('vit_giant_patch14_dinov2', lambda s: {
        k.replace('.fc1.', '.w12.').replace('.fc2.', '.w3.'): v for k, v in s.items()
    }, 'swiglu_fused'),
    'dinov2 registers': ('vit_small_patch14_reg4_dinov2', lambda s: {
        k.replace('reg_token', 'register_tokens'): v for k, v in s.items() if k != 'pos_embed'
    } | {'mask_token': MASK, 'pos_embed': torch.cat([0 * s['cls_token'], s['pos_embed']], dim=1)}, 'num_registers=4'),
    'deit3': ('deit3_small_patch16_224', lambda s: {
        'model': {k.replace('ls1.gamma', 'gamma_1').replace('ls2.gamma', 'gamma_2'): v for k, v in s.items()}
    }, 'layout: DeiT III\n'),
}  # fmt: skip


@pytest.mark.parametrize(('name', 'rename', 'said'), HOSTS.values(), ids=HOSTS)
@torch.no_grad()
def test_layouts_on_timms_names_compute_the_same(timm, tmp_path, name, rename, said):
    theirs = scrambled(timm.create_model(name, **TIMM | dict(num_classes=0)))
    model, text = converted(saved(rename(theirs.state_dict()), tmp_path), tmp_path, '--num-heads', str(HEADS))
    assert said in text and IMAGENET in text and 'head' not in model
    check(model['backbone'](images())[-1], theirs.forward_head(theirs.forward_features(images())))


# ---- torchvision


@pytest.mark.parametrize('representation', [None, 7])
@torch.no_grad()
def test_torchvision_models_compute_the_same(tmp_path, representation):
    from torchvision.models import VisionTransformer

    theirs = scrambled(VisionTransformer(IMAGE, PATCH, 2, HEADS, DIM, 40, num_classes=CLASSES,
                                         representation_size=representation))  # fmt: skip
    model, text = converted(saved(theirs.state_dict(), tmp_path), tmp_path)
    assert 'layout: torchvision ViT' in text and IMAGENET in text
    assert (f'hidden_dim={representation}' in text) == bool(representation)
    check(model['head'](model['backbone'](images())), theirs(images()))


# ---- Hugging Face

CLIP_TEXT = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2, vocab_size=9)
HF_MODELS = {
    'ViTModel': ('ViTConfig', HF, ['eps=1e-12', HALF, 'heads 3', 'config.json'], ['last_hidden_state']),
    'ViTForImageClassification': ('ViTConfig', HF | dict(num_labels=CLASSES), ['classes 5'], ['logits']),
    'Dinov2Model': ('Dinov2Config', HF, ['eps=1e-6', IMAGENET, 'Dinov2\n'], ['last_hidden_state']),
    'Dinov2ForImageClassification': ('Dinov2Config', HF, ['reads class token and mean patch'], []),
    'Dinov2WithRegistersModel': ('Dinov2WithRegistersConfig', HF, ['num_registers=4'], ['last_hidden_state']),
    'Dinov2Model giant': ('Dinov2Config', HF | dict(use_swiglu_ffn=True), ['swiglu_fused'], ['last_hidden_state']),
    'CLIPVisionModel': ('CLIPVisionConfig', HF, ['QuickGELU', 'pre_norm=True', CLIP], ['pooler_output']),
    'CLIPVisionModel gelu': ('CLIPVisionConfig', HF | dict(hidden_act='gelu'), ['pre_norm=True'], ['pooler_output']),
    'CLIPVisionModelWithProjection': ('CLIPVisionConfig', HF | dict(projection_dim=7), ['QuickGELU'], ['image_embeds']),
    'CLIPModel': ('CLIPConfig', dict(vision_config=HF, text_config=CLIP_TEXT, projection_dim=7), ['QuickGELU'], []),
    'BeitModel': ('BeitConfig', HF | dict(use_absolute_position_embeddings=True), ['avg_featmap'], ['pooler_output']),
    'ViTMAEForPreTraining': ('ViTMAEConfig', HF | dict(decoder_hidden_size=8, decoder_num_attention_heads=2,
                             decoder_num_hidden_layers=1, mask_ratio=0.0), ['ViTMAE', 'decoder of pre-training'], []),
}  # fmt: skip


@pytest.fixture
def transformers():
    return pytest.importorskip('transformers', reason='the extra weights is not installed')


def theirs_of(transformers, name, config, values):
    return scrambled(getattr(transformers, name.split()[0])(getattr(transformers, config)(**values)))


@pytest.mark.parametrize('how', ['file', 'memory'])
@pytest.mark.parametrize(('name', 'values'), HF_MODELS.items(), ids=HF_MODELS)
@torch.no_grad()
def test_hugging_face_models_compute_the_same(transformers, tmp_path, name, values, how):
    """As files of ``save_pretrained``, config.json beside them, and by the names in memory, without."""
    config, arguments, said, read = values
    theirs = theirs_of(transformers, name, config, arguments)
    if how == 'file':
        theirs.save_pretrained(tmp_path)
        model, text = converted(tmp_path / 'model.safetensors', tmp_path)
        assert all(part in text for part in said), text
    elif 'giant' in name:
        with pytest.raises(SystemExit, match='gate_proj'):  # a name of memory alone: files have another
            converted(saved(theirs.state_dict(), tmp_path), tmp_path)
        return
    else:
        act = ['--act', 'gelu' if 'gelu' in name else 'quick_gelu'] if 'CLIP' in name else []
        model, text = converted(saved(theirs.state_dict(), tmp_path), tmp_path, *act)
    features = model['backbone'](images())
    if 'neck' in model:
        embeds = theirs(images()).image_embeds if read else theirs.get_image_features(images()).pooler_output
        check(model['neck'](features)[0], embeds)
    elif read == ['logits']:
        check(model['head'](features), theirs(images()).logits)
    elif read == ['pooler_output']:
        check(features[-1], theirs(images()).pooler_output)
    else:
        encoder = getattr(theirs, 'vit', None) or getattr(theirs, 'dinov2', theirs)
        out = _unshuffled(encoder, images()) if 'MAE' in name else encoder(images()).last_hidden_state
        check(features[-1], out[:, 0])
        model['backbone'].out_type = 'raw'
        registers = model['backbone'].num_prefix_tokens - 1
        patches = out[:, 1 + registers :]
        check(model['backbone'](images())[-1][:, 1:], patches)


def _unshuffled(encoder, x):
    """MAE's encoder shuffles patches: the noise says how."""
    return encoder(x, noise=torch.arange((IMAGE // PATCH) ** 2).expand(len(x), -1).float()).last_hidden_state


@torch.no_grad()
def test_shards_of_hugging_face_are_one_model(transformers, tmp_path):
    theirs = theirs_of(transformers, 'ViTModel', 'ViTConfig', HF)
    theirs.save_pretrained(tmp_path, max_shard_size='5KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 2
    model, _ = converted(tmp_path / 'model.safetensors.index.json', tmp_path)
    check(model['backbone'](images())[-1], theirs(images()).last_hidden_state[:, 0])


@pytest.mark.parametrize(
    ('name', 'config', 'values', 'reason'),
    [
        ('DINOv3ViTModel', 'DINOv3ViTConfig', HF, 'RoPE'),
        ('BeitModel', 'BeitConfig', HF | dict(use_relative_position_bias=True), 'BEiT adds a bias for each pair'),
        ('DeiTModel', 'DeiTConfig', HF, 'distilled DeiT'),
        ('SiglipVisionModel', 'SiglipVisionConfig', HF, 'SigLIP'),
    ],
)
def test_hugging_face_models_that_are_no_plain_vit_are_refused_by_name(
    transformers, tmp_path, name, config, values, reason
):
    theirs_of(transformers, name, config, values).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=reason):
        converted(tmp_path / 'model.safetensors', tmp_path)
    assert not (tmp_path / 'dst.pth').exists()


# ---- OpenCLIP


@pytest.mark.parametrize('layer_scale', [None, 0.1])
@pytest.mark.parametrize('quick', [False, True])
@pytest.mark.parametrize('text_layers', [1, 5])
@torch.no_grad()
def test_open_clip_models_compute_the_same(tmp_path, quick, layer_scale, text_layers):
    """The text tower may be deeper than that of images."""
    open_clip = pytest.importorskip('open_clip', reason='the extra weights is not installed')
    vision = dict(layers=2, width=DIM, head_width=DIM // HEADS, patch_size=PATCH, image_size=IMAGE, mlp_ratio=2.0,
                  ls_init_value=layer_scale)  # fmt: skip
    text = dict(context_length=4, vocab_size=8, width=16, heads=2, layers=text_layers)
    theirs = scrambled(open_clip.model.CLIP(7, vision, text, quick_gelu=quick))
    src = saved(theirs.state_dict(), tmp_path)
    with pytest.raises(SystemExit, match='--act must say which GELU'):
        converted(src, tmp_path)
    model, said = converted(src, tmp_path, '--act', 'quick_gelu' if quick else 'gelu')
    assert ('QuickGELU' in said) == quick and CLIP in said and 'text tower' in said
    check(model['neck'](model['backbone'](images()))[0], theirs.encode_image(images()))
    tower = saved(theirs.visual.state_dict(), tmp_path, 'tower.pth')
    alone, _ = converted(tower, tmp_path, '--act', 'quick_gelu' if quick else 'gelu', '--force')
    check(alone['neck'](alone['backbone'](images()))[0], theirs.encode_image(images()))
