"""Every method of configs/_base_/methods in the backbone: start, gradients, dispatch, costs, merging."""

from pathlib import Path

import pytest
import torch
import torch.nn as nn
from mmengine.config import Config

from mmdyt.core.macs import count_macs
from mmdyt.core.observe import dynamic_branches, record_dispatch
from mmdyt.core.part import parts
from mmdyt.core.tuning import count_parameters, merge
from mmdyt.models import DyTVisionTransformer
from mmdyt.preflight.methods import use_method

FOLDER = Path(__file__).parents[2] / 'configs' / '_base_' / 'methods'
METHODS = sorted(path.stem for path in FOLDER.glob('*.py'))
DECIDING = ('dyt', 'evidence', 'context', 'avit')  # with dispatchers of their own
DIFFERENT = (
    'avit',
    'ether',
    'vpt_shallow',
    'vpt_deep',
    'adapter_plus',
    'sparse_tuning',
    'sparse_evidence',
    'tome',
    'tocom',
)
IDENTICAL = [m for m in METHODS if m not in DIFFERENT]  # at the start
MERGING = ['lora', 'ssf', 'ether', 'ether_plus']
ADDED = [m for m in METHODS if m not in ('linear', 'full', *DECIDING)]
FEWER = ['sparse_tuning', 'sparse_evidence', 'tome', 'tocom']  # whose attention runs on all tokens that are left
ARCH = dict(embed_dims=32, num_layers=4, num_heads=2, feedforward_channels=64)


def arguments(method, **options):
    cfg = Config(dict(model=dict(backbone=dict(type='mmdyt.DyTVisionTransformer'))))
    use_method(cfg, method, options)
    return {key: value for key, value in cfg.model.backbone.to_dict().items() if key != 'type'}


def build(method, options=None, **vit):
    torch.manual_seed(0)
    sizes = dict(arch=dict(ARCH), img_size=32, patch_size=8, drop_path_rate=0.0)
    backbone = DyTVisionTransformer(**(sizes | arguments(method, **(options or {})) | vit))
    backbone.init_weights()
    return backbone.double().eval()


def learn(backbone):
    """Move every part off its start, as training would."""
    for part in parts(backbone):
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.3)
            if part.word == 'ssf':
                parameter.data += 1.0
    return backbone


def images(number=3):
    return torch.randn(number, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def features(backbone, x=None):
    return backbone(images() if x is None else x)[-1]


def test_dispatchers_that_a_config_fits_are_trained_by_a_method_that_trains_them():
    cfg = Config(dict(model=dict(backbone=dict(type='mmdyt.DyTVisionTransformer', dispatcher=dict(tau=3.0)))))
    use_method(cfg, 'evidence')
    assert cfg.model.backbone.dispatcher == dict(type='mmdyt.TokenDispatcher', tau=3.0, noise=False, fitted=True)
    use_method(cfg, 'dyt')
    assert cfg.model.backbone.dispatcher == dict(type='mmdyt.TokenDispatcher', tau=3.0)


@pytest.mark.parametrize('method', IDENTICAL)
def test_a_fresh_one_is_the_pretrained_network(method):
    backbone, plain = build(method), build('linear')
    plain.load_state_dict({k: v for k, v in backbone.state_dict().items() if 'dynamic' not in k})
    for branch in dynamic_branches(backbone).values():
        branch.dispatcher.set_rule(-torch.inf)
    torch.testing.assert_close(features(backbone), features(plain), rtol=0, atol=1e-12)


@pytest.mark.parametrize('method', METHODS)
def test_a_plain_checkpoint_loads_and_leaves_out_parts_only(method):
    found = build(method).load_state_dict(build('linear').state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all('dynamic.' in name for name in found.missing_keys)


@pytest.mark.parametrize('method', METHODS)
def test_every_tuned_parameter_has_a_gradient_and_no_other(method):
    backbone = learn(build(method)).train()
    out = sum(level.square().sum() for level in backbone(images()))
    if out.requires_grad:  # a linear probe has nothing to learn here
        out.backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        # the last layer's patch tokens are not read, and what skips there learns nothing
        unread = 'layers.3.dynamic' in name or name == 'layers.3.attn.qkv.bias' or 'value' in name
        if parameter.requires_grad and not unread and '.attn.qkv.bias' not in name and 'gate' not in name:
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('dispatch', ['mlp', 'attn', 'attn_mlp', 'layer'])
def test_with_dispatch_packed_equals_masked_and_an_image_does_not_depend_on_its_batch(method, dispatch):
    if method in FEWER and dispatch != 'mlp':
        pytest.skip('refused: see test_fewer_tokens.py')
    if method == 'avit' and dispatch != 'layer':
        pytest.skip('refused: see test_halting_vit.py')
    word = method if method in DECIDING else f'{method}+dyt'
    options = dict(dispatch=dispatch) | ({} if method == 'adapter' or word == method else dict(adapter=None))
    if method == 'context' and dispatch == 'mlp':
        options['keys'] = 'active'  # the tokens of an MLP attend to nothing
    packed = learn(build(word, options))
    masked = learn(build(word, options, inference='masked'))
    masked.load_state_dict(packed.state_dict())
    with record_dispatch(packed) as record:
        out = features(packed)
    rates = [dispatch.patch_mask.mean().item() for dispatch in record.flat()]
    assert 0 < sum(rates) / len(rates) < 1
    torch.testing.assert_close(out, features(masked), rtol=0, atol=1e-9)
    torch.testing.assert_close(out[1:2], features(packed, images()[1:2]), rtol=0, atol=1e-9)


@pytest.mark.parametrize('method', METHODS)
def test_maps_rates_and_cells_see_no_prompt(method):
    backbone = build(f'{method}+dyt' if method not in DECIDING else method, out_type='featmap')
    with record_dispatch(backbone) as record:
        assert features(backbone).shape == (3, 32, 4, 4)
    assert {dispatch.on_patches(dispatch.patch_mask).shape for dispatch in record.flat()} == {(3, 16, 1)}
    clips = images(4).unflatten(0, (2, 2)).transpose(1, 2)
    assert features(build(method, out_type='raw'), clips).shape == (2, 2, 17, 32)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('skip_unread', [False, True])
def test_closed_form_equals_the_operator_counter(method, skip_unread):
    if method.startswith('ether'):
        pytest.skip('reflections are element-wise products, which the counter does not see')
    backbone = build(method, dict(dispatcher=None, substitute=None), skip_unread=skip_unread)
    with torch.no_grad():
        assert backbone.macs(32, 32, {}) == count_macs(lambda: backbone(images(1)))


@pytest.mark.parametrize('method', METHODS)
def test_what_ran_is_what_was_expected_to_run(method):
    backbone = learn(build(f'{method}+dyt' if method not in DECIDING else method))
    with record_dispatch(backbone) as record:
        features(backbone)
    active = {name: passes[0].mask.sum((1, 2)) for name, passes in record.dispatches.items()}
    ran = backbone.macs_of(16, {name: passes[0] for name, passes in record.runs.items()})
    assert ran.shape == (3,)
    torch.testing.assert_close(ran, backbone.macs(32, 32, active))


@pytest.mark.parametrize('method', METHODS)
def test_unread_tokens_can_be_skipped_without_changing_the_class_token(method):
    word = f'{method}+dyt' if method not in DECIDING else method
    whole, short = learn(build(word)), learn(build(word, skip_unread=True))
    short.load_state_dict(whole.state_dict())
    torch.testing.assert_close(features(short), features(whole), rtol=0, atol=1e-9)


@pytest.mark.parametrize('method', MERGING)
@pytest.mark.parametrize('dispatched', [False, True])
def test_merged_equals_unmerged_and_costs_nothing_more(method, dispatched):
    backbone = learn(build(f'{method}+dyt' if dispatched else method, dict(adapter=None)))
    before = features(backbone)
    assert merge(backbone) == []
    torch.testing.assert_close(features(backbone), before, rtol=0, atol=1e-9)
    assert count_parameters(backbone).get(method, 0) == 0
    gates = sum(b.dispatcher.macs_per_token() * 16 for b in dynamic_branches(backbone).values())
    assert backbone.macs(32, 32, {}) == backbone.dense_macs(32, 32) + gates


def test_several_rewrites_of_one_linear_run_and_merge_alike():
    lora = [dict(type='mmdyt.LoRA', on='attn.qkv'), dict(type='mmdyt.LoRA', on='mlp.fc1', dropout=0.0)]
    options = dict(parts=[*lora, dict(type='mmdyt.SSF'), dict(type='mmdyt.ETHERPlus', on=['attn.q', 'mlp.fc1'])])
    backbone = learn(build('linear', None, **options))
    before = features(backbone)
    torch.testing.assert_close(features(backbone), before)
    assert merge(backbone) == []
    torch.testing.assert_close(features(backbone), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ('method', 'options', 'tuned', 'gmacs'),
    # ViT-B/16 at 224 without head; arXiv 2106.09685, 2210.08823, 2106.10199, 2405.20271, 2203.12119, 2406.06820
    [
        ('linear', {}, 0, 17.582),
        ('lora', {}, 294_912, 17.640),
        ('lora', dict(on='linears', rows=None), 1_327_104, 17.843),
        ('ssf', {}, 205_824, 17.582),
        ('bitfit', {}, 102_912, 17.582),
        ('ether', {}, 82_944, 17.615),
        ('ether_plus', {}, 331_776, 17.713),
        ('avit', {}, 1_198_091, 17.816),  # nothing halts
        ('sparse_tuning', {}, 1_091_584, 11.754),
        ('sparse_evidence', {}, 1_091_584, 11.754),
        ('tome', {}, 0, 13.122),
        ('tocom', {}, 0, 13.122),
        ('tocom', dict(r=13), 0, 10.381),
        ('vpt_shallow', {}, 7_680, 18.507),
        ('vpt_deep', {}, 92_160, 18.507),
        ('vpt_deep', dict(length=1), 9_216, 17.674),
        ('vpt_deep', dict(length=50), 460_800, 22.243),
        ('vpt_deep', dict(length=100), 921_600, 26.995),
        ('adapter_plus', {}, 165_984, 17.611),
        ('adapter', {}, 1_189_632, 17.814),
        ('adapter', dict(bottleneck=8), 156_768, 17.611),
    ],
)
def test_vit_b_has_the_published_parameters_and_macs(method, options, tuned, gmacs):
    with torch.device('meta'):
        backbone = DyTVisionTransformer('base', **arguments(method, **options))
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == tuned
    assert backbone.macs(224, 224, {}) / 1e9 == pytest.approx(gmacs, abs=6e-4)
