"""The four dispatch variants: mlp, attn, attn_mlp, layer."""

import pytest
import torch
import torch.nn as nn
from test_vit import TINY, make_pair, set_all, spread_masks

from mmdyt.core.macs import count_macs
from mmdyt.core.observe import complete_model, decisions, dynamic_branches, record_dispatch
from mmdyt.core.tuning import count_parameters
from mmdyt.models import DyTVisionTransformer

VARIANTS = ('mlp', 'attn', 'attn_mlp', 'layer')
EVERY = pytest.mark.parametrize('dispatch', VARIANTS)


def make(dispatch, **vit):
    _, model = make_pair(dispatch=dispatch, **dict(out_type='raw') | vit)
    spread_masks(model)
    return model


def use(model, name, value):
    for branch in dynamic_branches(model).values():
        setattr(branch, name, value)


def same_masks(model, record):
    """Within the context the dispatchers decide what they did in a recorded pass."""
    rules = {name: lambda *asked, dispatch=passes[0]: dispatch for name, passes in record.dispatches.items()}
    return decisions(model, rules)


@EVERY
@pytest.mark.parametrize('bottleneck', [4, 9])
def test_parameters_follow_the_formula(dispatch, bottleneck):
    model = DyTVisionTransformer(
        arch=TINY, img_size=32, patch_size=8, dispatch=dispatch, adapter=dict(bottleneck=bottleneck)
    )
    each = 3 * (2 if dispatch == 'attn_mlp' else 1)
    counts = count_parameters(model)
    assert counts['adapter'] == each * (2 * 32 * bottleneck + bottleneck + 32)
    assert counts['dispatcher'] == each * 33
    moe = dict(type='mmdyt.MoEAdapter', bottleneck=bottleneck, num_experts=3)
    model = DyTVisionTransformer(arch=TINY, img_size=32, patch_size=8, dispatch=dispatch, adapter=moe)
    assert count_parameters(model)['adapter'] == each * 3 * (2 * 32 * bottleneck + bottleneck + 32 + 33)


@EVERY
@pytest.mark.parametrize('batch', [1, 2, 5])
@pytest.mark.parametrize('active', ['none', 'some', 'all'])
@torch.no_grad()
def test_packed_equals_masked(dispatch, batch, active):
    model = make(dispatch)
    if active != 'some':
        set_all(model, active == 'all')
    x = torch.randn(batch, 3, 32, 32)
    packed = model(x)[0]
    use(model, 'inference', 'masked')
    torch.testing.assert_close(packed, model(x)[0], rtol=0, atol=1e-5)


@EVERY
@torch.no_grad()
def test_packed_equals_masked_without_a_cls_token(dispatch):
    model = make(dispatch, with_cls_token=False)
    x = torch.randn(3, 3, 32, 32)
    packed = model(x)[0]
    use(model, 'inference', 'masked')
    torch.testing.assert_close(packed, model(x)[0], rtol=0, atol=1e-5)
    set_all(model, active=False)
    assert torch.isfinite(model(x)[0]).all()


@EVERY
@torch.no_grad()
def test_an_image_gives_the_same_output_alone_and_in_any_batch(dispatch):
    model, x = make(dispatch), torch.randn(4, 3, 32, 32)
    whole = model(x)[0]
    for i in range(4):
        torch.testing.assert_close(model(x[i : i + 1])[0][0], whole[i], rtol=0, atol=1e-5)


@EVERY
@torch.no_grad()
def test_training_computes_the_function_of_inference_at_equal_masks(dispatch):
    model, x = make(dispatch), torch.randn(2, 3, 32, 32)
    for branch in dynamic_branches(model).values():
        branch.adapter.dropout.p = 0.0
    with record_dispatch(model) as record:
        inferred = model(x)[0]
    with same_masks(model, record):
        trained = model.train()(x)[0]
        torch.testing.assert_close(trained, inferred, rtol=0, atol=1e-5)
        use(model, 'training_executor', 'masked_all_keys')
        gap = (model(x)[0] - inferred).abs().max()
    assert (gap < 1e-5) == (dispatch == 'mlp')  # eq. (5) taken literally trains another attention


@EVERY
@torch.no_grad()
def test_complete_model_with_fresh_adapters_is_the_plain_vit(dispatch):
    plain, model = make_pair(dispatch=dispatch, out_type='raw')
    x = torch.randn(2, 3, 32, 32)
    with complete_model(model):
        got, expected = model(x)[0], plain(x)[0]
    if dispatch == 'layer':  # x + (a + b) for (x + a) + b
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    else:
        assert torch.equal(got, expected)


@EVERY
@torch.no_grad()
def test_closed_form_equals_an_operator_counter_at_real_masks(dispatch, monkeypatch):
    def plain_attention(query, key, value, attn_mask=None, dropout_p=0.0):
        assert attn_mask is None
        return (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1) @ value

    model, x = make(dispatch), torch.randn(3, 3, 30, 45)
    with record_dispatch(model) as record:
        fused = count_macs(lambda: model(x))
    active = {name: passes[0].mask.sum(dim=(1, 2)) for name, passes in record.dispatches.items()}
    expected = torch.as_tensor(model.macs(30, 45, active)).expand(3).sum().item()
    monkeypatch.setattr(nn.functional, 'scaled_dot_product_attention', plain_attention)
    for layer in model.layers:
        monkeypatch.setattr(layer.attn, 'scaled_dot_product_attention', plain_attention)
    assert count_macs(lambda: model(x)) == fused == expected
    assert expected < 3 * model.macs(30, 45, {})


@EVERY
def test_gradients_are_those_of_a_slow_reference_in_float64(dispatch):
    """The variants written out from the equations for one layer, with loops over images and active tokens."""
    torch.manual_seed(0)
    model = DyTVisionTransformer(
        arch=dict(TINY, num_layers=1), img_size=32, patch_size=8, out_type='raw', final_norm=False, dispatch=dispatch
    ).double()
    for branch in dynamic_branches(model).values():
        nn.init.normal_(branch.adapter.up.weight)
        branch.adapter.dropout.p = 0.0
    layer = model.layers[0].train()
    x = torch.randn(3, 17, 32, dtype=torch.float64)
    target = torch.randn_like(x)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    tuned = [p for p in layer.parameters() if p.requires_grad]

    torch.manual_seed(5)
    with record_dispatch(layer) as record:
        loss = (layer(x) * target).sum()
    grads = torch.autograd.grad(loss, tuned)

    masks = {name.split('.')[1]: passes[0].mask for name, passes in record.dispatches.items()}

    def attention(h, mask):
        rows = []
        for b in range(3):
            k = mask[b, :, 0].detach().bool()
            q_, k_, v_ = (layer.ln1(h[b]) @ layer.attn.qkv.weight.T + layer.attn.qkv.bias).chunk(3, dim=-1)
            heads = []
            for s in (slice(0, 16), slice(16, 32)):
                heads.append((q_[:, s] @ k_[k][:, s].T / 4).softmax(-1) @ v_[k][:, s])
            rows.append(torch.cat(heads, -1) @ layer.attn.proj.weight.T + layer.attn.proj.bias)
        return torch.stack(rows)

    def mlp(h):
        return layer.ffn.layers(layer.ln2(h))

    def adapter(kind, h):
        a = layer.dynamic[kind].adapter
        return 0.1 * (torch.relu(h @ a.down.weight.T + a.down.bias) @ a.up.weight.T + a.up.bias)

    # the same noise, and the straight-through mask of eqs. (4), (5) written out
    torch.manual_seed(5)

    def sample(kind, h):
        gate = layer.dynamic[kind].dispatcher.gate
        z = h[:, 1:] @ gate.weight.T + gate.bias
        g1 = -torch.empty_like(z).exponential_().log()
        g2 = -torch.empty_like(z).exponential_().log()
        soft = torch.sigmoid((z + g1 - g2) / 5)
        hard = (soft > 0.5).double() - soft.detach() + soft
        mask = torch.cat([torch.ones(3, 1, 1, dtype=torch.float64), hard], 1)
        assert torch.equal(mask.detach().round(), masks[kind].detach())
        return mask

    everyone = torch.ones(3, 17, 1)
    h = x
    if dispatch == 'layer':
        m = sample('layer', h)
        inner = attention(h, m)
        h = h + m * (inner + mlp(h + inner)) + adapter('layer', h)
    else:
        if dispatch in ('attn', 'attn_mlp'):
            m = sample('attn', h)
            h = h + m * attention(h, m) + adapter('attn', h)
        else:
            h = h + attention(h, everyone)
        dispatched = dispatch in ('mlp', 'attn_mlp')
        h = h + sample('mlp', h) * mlp(h) + adapter('mlp', h) if dispatched else h + mlp(h)
    expected = torch.autograd.grad((h * target).sum(), tuned)
    for name, got, want in zip(names, grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f'{name}: {text}')
    assert all(g.abs().sum() > 0 for name, g in zip(names, grads, strict=True) if 'dispatcher' in name)
