"""Registers of the base, and what else CLIP and DINOv2 have: the same as plain layers, by every way of running them."""

import pytest
import torch
from mmpretrain.models.backbones import VisionTransformer
from test_vit import TINY, spread_masks
from test_vit_variants import EVERY, use

from mmdyt.core.macs import count_macs
from mmdyt.core.observe import complete_model, dynamic_branches, record_dispatch
from mmdyt.models import DyTVisionTransformer

BASE = dict(arch=TINY, img_size=32, patch_size=8)
R = 4
BASES = {
    'dinov2': dict(num_registers=R, layer_scale_init_value=0.3),
    'giant': dict(num_registers=R, layer_scale_init_value=0.3, layer_cfgs=dict(ffn_type='swiglu_fused')),
    'clip': dict(pre_norm=True, layer_cfgs=dict(act_cfg=dict(type='mmpretrain.QuickGELU'))),
    'beit': dict(layer_scale_init_value=0.3, qkv_bias=False),
    'all': dict(num_registers=R, layer_scale_init_value=0.3, qkv_bias=False, pre_norm=True),
}
EACH_BASE = pytest.mark.parametrize('base', BASES.values(), ids=BASES)


def make(out_type='raw', **options):
    """A model whose parts and registers are no longer fresh."""
    torch.manual_seed(0)
    model = DyTVisionTransformer(**BASE, out_type=out_type, **options)
    if model.register_tokens is not None:
        torch.nn.init.normal_(model.register_tokens)
    spread_masks(model)
    return model.eval()


def plain_features(model, x, **base):
    """mmpretrain's own layers on [CLS, registers, patches]: its raw output without the registers."""
    number = base.pop('num_registers', 0)
    host = VisionTransformer(**BASE, out_type='raw', **base)
    host.load_state_dict({k: v for k, v in model.state_dict().items() if k in host.state_dict()})
    host.train(False)
    tokens, _ = host.patch_embed(x)
    tokens = torch.cat([host.cls_token.expand(len(x), -1, -1), tokens], dim=1) + host.pos_embed
    registers = model.register_tokens.expand(len(x), -1, -1) if number else tokens[:, :0]
    tokens = host.pre_norm(torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1))
    for layer in host.layers:
        tokens = layer(tokens)
    tokens = host.ln1(tokens)
    return torch.cat([tokens[:, :1], tokens[:, 1 + number :]], dim=1)


@EACH_BASE
@torch.no_grad()
def test_a_complete_model_without_parts_is_the_plain_vit(base):
    model, x = make(**base, adapter=None, dispatcher=None), torch.randn(2, 3, 32, 32)
    expected = plain_features(model, x, **base)
    torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=1e-5)
    if base.get('num_registers'):
        torch.nn.init.zeros_(model.register_tokens)
        assert (model(x)[0] - expected).abs().max() > 1e-3  # they are read


@EVERY
@EACH_BASE
@pytest.mark.parametrize('skip_unread', [False, True])
@torch.no_grad()
def test_packed_fixed_and_masked_are_one_and_billed_as_counted(dispatch, base, skip_unread):
    model = make('cls_token' if skip_unread else 'raw', dispatch=dispatch, skip_unread=skip_unread, **base)
    x, prefix = torch.randn(3, 3, 32, 40), 1 + base.get('num_registers', 0)
    with record_dispatch(model) as alone:  # several images are padded to the longest where one token reads
        counted = count_macs(lambda: model(x[:1]))
    runs = {name: passes[0] for name, passes in alone.runs.items()}
    assert counted == torch.as_tensor(model.macs_of(20, runs)).item()
    with record_dispatch(model) as record:
        packed = model(x)[0]
    assert len(record.flat()) == len(dynamic_branches(model))
    for found in record.flat():
        assert found.num_prefix_tokens == prefix and found.mask[:, :prefix].all()
        if found.patch_mask.numel():  # below a class token the last layer asks nobody
            assert found.patch_mask.shape == (3, 20, 1) and 0 < found.patch_mask.mean() < 1
    use(model, 'inference', 'masked')
    torch.testing.assert_close(packed, model(x)[0], rtol=0, atol=1e-5)
    use(model, 'inference', 'auto')
    for branch in dynamic_branches(model).values():
        branch.dispatcher.set_rule(capacity=0.5)
    fixed = model(x)[0]
    use(model, 'inference', 'masked')
    torch.testing.assert_close(fixed, model(x)[0], rtol=0, atol=1e-5)


@EVERY
@EACH_BASE
def test_split_training_has_the_gradients_of_masked_training(dispatch, base):
    grads = []
    for training in ('split', 'masked'):
        model = make(dispatch=dispatch, training=training, dispatcher=dict(noise=False), **base).train()
        for branch in dynamic_branches(model).values():
            branch.adapter.dropout.p = 0.0
        torch.manual_seed(1)
        model(torch.randn(2, 3, 32, 32))[0].pow(3).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert grads[0] and grads[0].keys() == grads[1].keys()
    for name, wanted in grads[1].items():
        torch.testing.assert_close(grads[0][name], wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


@pytest.mark.parametrize('skip_unread', [False, True])
@torch.no_grad()
def test_the_dense_count_is_that_of_the_operators(skip_unread):
    options = dict(out_type='cls_token', skip_unread=skip_unread) if skip_unread else {}
    model = make(num_registers=R, adapter=None, dispatcher=None, pre_norm=True, **options)
    ran = count_macs(lambda: model(torch.randn(1, 3, 32, 32)))
    assert ran == model.macs(32, 32, {})
    assert (ran < model.dense_macs(32, 32)) if skip_unread else (ran == model.dense_macs(32, 32))
    more = model.dense_macs(32, 32) - make(adapter=None, dispatcher=None, pre_norm=True).dense_macs(32, 32)
    linears = 3 * (4 * 32 * 32 + 2 * 32 * TINY['feedforward_channels'])
    assert more > R * linears


@pytest.mark.parametrize('out_type', ['raw', 'cls_token', 'featmap', 'avg_featmap'])
@torch.no_grad()
def test_hosts_get_what_they_get_without_registers(out_type):
    shapes = [make(out_type, num_registers=number)(torch.randn(2, 3, 40, 32))[0].shape for number in (0, R)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    'part',
    [
        dict(type='mmdyt.ToMe', r=3),
        dict(type='mmdyt.SparseTokens', keep_rate=0.5),
        dict(type='mmdyt.Prompts', length=3),
    ],
    ids=lambda part: part['type'],
)
@torch.no_grad()
def test_registers_are_never_merged_dropped_or_replaced(part):
    """With any of them gone the class token would come out otherwise than with all of them beside the same patches."""
    model = make('cls_token', num_registers=R, parts=[part], adapter=None, dispatcher=None)
    seen = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append((args[0][:, 1 : 1 + R], args[1])))
    x = torch.randn(2, 3, 32, 32)
    before = model(x)[0]
    assert torch.equal(seen[0][0], model.register_tokens.expand(2, -1, -1))
    assert all(state.prefix == 1 + R for _, state in seen)
    model.register_tokens.data.neg_()
    assert (model(x)[0] - before).abs().max() > 1e-3
    with record_dispatch(model) as record:
        counted = count_macs(lambda: model(x))
    runs = {name: passes[0] for name, passes in record.runs.items()}
    assert counted == torch.as_tensor(model.macs_of(16, runs)).double().expand(2).sum().item()


@torch.no_grad()
def test_clips_have_registers_in_every_frame():
    model = make(num_registers=R)
    clip = torch.randn(2, 3, 3, 32, 32)
    frames = model(clip.transpose(1, 2).flatten(0, 1))[0]
    torch.testing.assert_close(model(clip)[0].flatten(0, 1), frames, rtol=0, atol=1e-5)


def test_registers_are_frozen_base_parameters_of_the_first_depth():
    model = make(num_registers=R)
    assert model.register_tokens.shape == (1, R, 32) and not model.register_tokens.requires_grad
    assert model.get_layer_depth('backbone.register_tokens', 'backbone.') == (0, 5)
    assert model.get_layer_depth('layers.0.ln1.weight') == (1, 5)
    assert DyTVisionTransformer(**BASE, num_registers=R, tuned='all').register_tokens.requires_grad
    assert 'register_tokens' not in DyTVisionTransformer(**BASE).state_dict()


@torch.no_grad()
def test_complete_model_is_the_model_with_all_active():
    model, x = make(num_registers=R), torch.randn(2, 3, 32, 32)
    with complete_model(model):
        complete = model(x)[0]
    for branch in dynamic_branches(model).values():
        branch.dispatcher.set_rule(capacity=1.0)
    torch.testing.assert_close(complete, model(x)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(num_registers=-1), 'num_registers must be at least 0, got -1'),
        (dict(num_registers=1.5), 'num_registers must be at least 0, got 1.5'),
        (dict(num_registers=True), 'num_registers must be at least 0, got True'),
        (dict(num_registers=2, with_cls_token=False, out_type='featmap'), 'num_registers must be 0 with'),
    ],
    ids=str,
)
def test_wrong_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DyTVisionTransformer(**BASE, **options)


@torch.no_grad()
def test_an_export_has_them():
    model, x = make(num_registers=R, layer_scale_init_value=0.3), torch.randn(2, 3, 32, 32)
    for branch in dynamic_branches(model).values():
        branch.dispatcher.set_rule(capacity=0.5)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x)[0], model(x)[0], rtol=0, atol=1e-5)
