"""Networks that timm and transformers build: adapted, they give what they gave, and cost what a counter counts.

The extra ``weights`` brings the libraries, in an environment of its own (docs/weights.md).
"""

import pytest
import torch
from library_vits import scrambled
from test_adapt import close, stirred

import mmdyt
from mmdyt.core.losses import activation_rate
from mmdyt.core.macs import count_macs
from mmdyt.core.observe import complete_model, record_dispatch

DIM, HEADS, PATCH, IMAGE = 24, 3, 4, 12
TIMM = dict(embed_dim=DIM, depth=2, num_heads=HEADS, img_size=IMAGE, patch_size=PATCH, num_classes=5)
HF = dict(hidden_size=DIM, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=40, image_size=IMAGE,
          patch_size=PATCH)  # fmt: skip
TIMM_MODELS = {
    'vit': ('vit_base_patch16_224', {}),
    'mean patch': ('vit_base_patch16_224', dict(global_pool='avg')),
    'deit3': ('deit3_small_patch16_224', {}),
    'distilled': ('deit_base_distilled_patch16_224', {}),
    'dinov2 registers': ('vit_small_patch14_reg4_dinov2', {}),
    'dinov2 giant': ('vit_giant_patch14_dinov2', {}),
    'clip': ('vit_base_patch16_clip_224', {}),
}
TIMM_REFUSED = {
    'norms of queries': ('vit_base_patch16_224', dict(qk_norm=True), 'attn.q_norm.weight'),
    'rope': ('vit_base_patch16_rope_224', {}, 'rope'),
    'eva': ('eva02_tiny_patch14_224', {}, 'rope'),
    'relative positions': ('vit_srelpos_small_patch16_224', {}, 'shared_rel_pos'),
    'beit': ('beit_base_patch16_224', {}, 'gamma_1'),
}
HF_MODELS = {
    'vit': ('ViTForImageClassification', 'ViTConfig', {}),
    'deit': ('DeiTForImageClassificationWithTeacher', 'DeiTConfig', {}),
    'dinov2': ('Dinov2Model', 'Dinov2Config', {}),
    'dinov2 maps': ('Dinov2Backbone', 'Dinov2Config', dict(out_indices=[1, 2])),
    'dinov2 giant': ('Dinov2ForImageClassification', 'Dinov2Config', dict(use_swiglu_ffn=True)),
    'dinov2 registers': ('Dinov2WithRegistersModel', 'Dinov2WithRegistersConfig', {}),
    'clip': ('CLIPVisionModel', 'CLIPVisionConfig', {}),
    'siglip': ('SiglipVisionModel', 'SiglipVisionConfig', {}),
}
HF_REFUSED = {
    'dinov3': ('DINOv3ViTModel', 'DINOv3ViTConfig', {}, 'rotary'),
    'beit': ('BeitModel', 'BeitConfig', {}, 'lambda_1'),
    'bert': ('BertModel', 'BertConfig', {}, 'got a BertModel'),
}


@pytest.fixture
def timm():
    return pytest.importorskip('timm', reason='the extra weights is not installed')


@pytest.fixture
def transformers():
    return pytest.importorskip('transformers', reason='the extra weights is not installed')


def images():
    return torch.randn(2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(1))


def flat(output) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    values = [value for value in output.values() if value is not None]
    return [t for value in values for t in (value if isinstance(value, tuple) else (value,))]


def check(vit, **said):
    """Complete: the original. At half the rate: packed equals masked, and costs are those of a counter. Merged LoRA."""
    x = images()
    expected = flat(vit(x, **said))
    plain = count_macs(lambda: vit(x)) / 2
    model = stirred(mmdyt.adapt(vit, [dict(type='TokenDispatcher'), dict(type='LoRA', on='linears')], rate=0.5))
    for module in model.modules():
        if type(module).__name__ == 'LoRA':
            module.reset_parameters()
    with complete_model(model):
        found = flat(model(x, **said))
    assert len(found) == len(expected) and expected[0].std() > 0.05
    for one, other in zip(found, expected, strict=True):
        close(one, other)
    stirred(model)
    with record_dispatch(model) as record:
        fixed = flat(model(x, **said))
    patches = record.flat()[0].patch_mask.shape[1]
    assert activation_rate(record.flat()) == round(0.5 * patches) / patches
    assert model.plain_macs(x) == plain
    assert torch.as_tensor(model.macs(x)).expand(2).tolist() == [count_macs(lambda: model(x)) / 2] * 2
    assert model.merge() == []
    for _, branch in model.named_modules():
        if hasattr(branch, 'break_even'):
            branch.inference = 'masked'
    for one, other in zip(flat(model(x, **said)), fixed, strict=True):
        close(one, other)


@pytest.mark.parametrize(('name', 'changes'), TIMM_MODELS.values(), ids=TIMM_MODELS)
@torch.no_grad()
def test_of_timm(timm, name, changes):
    check(scrambled(timm.create_model(name, **TIMM | changes)))


@pytest.mark.parametrize(('name', 'changes', 'said'), TIMM_REFUSED.values(), ids=TIMM_REFUSED)
def test_of_timm_is_refused_by_name(timm, name, changes, said):
    with pytest.raises(ValueError, match=said):
        mmdyt.adapt(timm.create_model(name, **TIMM | changes))


@torch.no_grad()
def test_features_of_timm_in_between(timm):
    vit = scrambled(timm.create_model('vit_base_patch16_224', **TIMM))
    expected = vit.forward_intermediates(images())[1]
    model = mmdyt.adapt(vit, 'dyt')
    with complete_model(model):
        for one, other in zip(vit.forward_intermediates(images())[1], expected, strict=True):
            close(one, other)


def test_checkpointing_of_timm_is_refused(timm):
    vit = timm.create_model('vit_base_patch16_224', **TIMM)
    model = mmdyt.adapt(vit, 'dyt').train()
    vit.set_grad_checkpointing()
    with pytest.raises(ValueError, match='checkpointing must be off'):
        model(images()).sum().backward()
    other = timm.create_model('vit_base_patch16_224', **TIMM)
    other.set_grad_checkpointing()
    with pytest.raises(ValueError, match='grad_checkpointing must be off'):
        mmdyt.adapt(other)


@pytest.mark.parametrize(('name', 'config', 'changes'), HF_MODELS.values(), ids=HF_MODELS)
@torch.no_grad()
def test_of_hugging_face(transformers, name, config, changes):
    settings = getattr(transformers, config)(**HF | changes)
    check(scrambled(getattr(transformers, name)(settings)), output_hidden_states=True)


@pytest.mark.parametrize(('name', 'config', 'changes', 'said'), HF_REFUSED.values(), ids=HF_REFUSED)
def test_of_hugging_face_is_refused_by_name(transformers, name, config, changes, said):
    settings = getattr(transformers, config)(**HF | changes)
    with pytest.raises(ValueError, match=said):
        mmdyt.adapt(getattr(transformers, name)(settings))


def test_attention_weights_of_hugging_face_are_refused(transformers):
    model = mmdyt.adapt(transformers.ViTModel(transformers.ViTConfig(**HF)), 'dyt')
    with pytest.raises(ValueError, match='output_attentions must not be given'):
        model(images(), output_attentions=True)


def test_checkpointing_of_hugging_face_is_refused(transformers):
    vit = transformers.ViTModel(transformers.ViTConfig(**HF))
    model = mmdyt.adapt(vit, 'dyt').train()
    vit.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match='checkpointing must be off'):
        model(images()).last_hidden_state.sum().backward()
    other = transformers.ViTModel(transformers.ViTConfig(**HF))
    other.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match='gradient_checkpointing must be off'):
        mmdyt.adapt(other)
