"""The last layer computes only what a head on the class token reads."""

import pytest
import torch
import torch.nn as nn
from test_vit import TINY, make_pair, set_all, spread_masks
from test_vit_variants import EVERY, use

from mmdyt.core.grid import active_share
from mmdyt.core.macs import count_macs
from mmdyt.core.observe import all_branches, complete_model, dynamic_branches, record_dispatch
from mmdyt.models import DyTVisionTransformer


def make_twins(**vit):
    """The same model without and with ``skip_unread``, adapters and dispatchers no longer fresh."""
    _, whole = make_pair(**vit)
    spread_masks(whole)
    short = DyTVisionTransformer(arch=TINY, img_size=32, patch_size=8, skip_unread=True, **vit)
    short.load_state_dict(whole.state_dict())
    return whole.eval(), short.eval()


@EVERY
@pytest.mark.parametrize('batch', [1, 4])
@pytest.mark.parametrize('active', ['none', 'some', 'all'])
@pytest.mark.parametrize('inference', ['packed', 'masked'])
@torch.no_grad()
def test_same_features(dispatch, batch, active, inference):
    whole, short = make_twins(dispatch=dispatch)
    for model in (whole, short):
        use(model, 'inference', inference)
        if active != 'some':
            set_all(model, active == 'all')
    x = torch.randn(batch, 3, 32, 32)
    torch.testing.assert_close(short(x)[0], whole(x)[0], rtol=0, atol=1e-5)
    with complete_model(whole), complete_model(short):
        torch.testing.assert_close(short(x)[0], whole(x)[0], rtol=0, atol=1e-5)


@EVERY
def test_same_gradients_in_eval_and_in_training(dispatch):
    whole, short = make_twins(dispatch=dispatch)
    for mode in (False, True):
        grads = []
        for model in (whole, short):
            torch.manual_seed(7)
            x = torch.randn(2, 3, 32, 32, requires_grad=True)
            for branch in dynamic_branches(model).values():
                branch.adapter.dropout.p = 0.0  # draws for other tokens
            with record_dispatch(model) as record:
                out = model.train(mode)(x)[0]
            rate = torch.cat([d.patch_mask.flatten() for d in record.flat()]).mean() if mode else 0
            tuned = [x] + [p for p in model.parameters() if p.requires_grad]
            grads.append(torch.autograd.grad(out.pow(3).sum() + rate, tuned, allow_unused=True))
        for wanted, got in zip(*grads, strict=True):
            assert got is None or torch.allclose(got, wanted, rtol=1e-3, atol=1e-5)
            assert got is not None or wanted is None or not wanted.any()
        assert grads[0][0].abs().sum() > 1


def test_in_training_the_class_token_alone_runs_the_last_mlp():
    _, model = make_twins()
    rows = []
    for linear in (module for module in model.layers[-1].ffn.modules() if isinstance(module, nn.Linear)):
        linear.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    with record_dispatch(model) as record:
        model.train()(torch.randn(2, 3, 32, 32))
    assert rows == [1, 1] and record.flat()[-1].patch_mask.shape == (2, 16, 1)


@pytest.mark.parametrize('adapter', [None, dict(bottleneck=4)])
@pytest.mark.parametrize('mode', [True, False])
def test_baselines_too(adapter, mode):
    models = [
        DyTVisionTransformer(arch=TINY, img_size=32, patch_size=8, adapter=adapter, dispatcher=None, skip_unread=skip)
        for skip in (False, True)
    ]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        for branch in all_branches(model.train(mode)).values():
            for delta in branch.deltas():
                delta.dropout.p = 0.0
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(models[0](x)[0], models[1](x)[0], rtol=0, atol=1e-5)
    assert count_macs(lambda: models[1](x)) == 3 * models[1].macs(32, 32, {}) < 3 * models[0].macs(32, 32, {})


@EVERY
@torch.no_grad()
def test_closed_form_equals_an_operator_counter(dispatch):
    _, model = make_twins(dispatch=dispatch)
    for seed in range(3):
        x = torch.randn(1, 3, 32, 40, generator=torch.Generator().manual_seed(seed))
        with record_dispatch(model) as record:
            counted = count_macs(lambda x=x: model(x))
        active = {name: passes[0].mask.sum().item() for name, passes in record.dispatches.items()}
        assert counted == model.macs(32, 40, active)


def test_saves_what_the_paper_leaves_in_the_last_layer():
    """ViT-B at 224, d = 64, p = 1: patch MLP, adapter, queries, projection, norms of 196 tokens, by hand."""
    with torch.device('meta'):
        whole, short = (DyTVisionTransformer('base', img_size=224, skip_unread=skip) for skip in (False, True))
    c, d, n = 768, 64, 197
    attention = 196 * 2 * c * c + 196 * 2 * n * c
    others = 196 * (8 * c * c + 5 * c) + 196 * 2 * c * d + 196 * c + 196 * 5 * c  # MLP, adapter, gate, final norm
    assert whole.macs(224, 224, {}) - short.macs(224, 224, {}) == attention + others


@torch.no_grad()
def test_recorded_masks_say_that_no_patch_ran():
    _, model = make_twins(dispatch='mlp')
    with record_dispatch(model) as record:
        model(torch.randn(2, 3, 32, 32))
    last = record.dispatches[list(dynamic_branches(model))[-1]][0]
    assert last.patch_mask.sum() == 0
    assert active_share(record.flat(), (4, 4)).max() <= 1 - 1 / len(record.names)


@pytest.mark.parametrize(
    'vit', [dict(out_type='featmap'), dict(out_type='raw'), dict(out_type='avg_featmap'), dict(out_indices=(0, 2))]
)
def test_refused_where_other_tokens_are_read(vit):
    with pytest.raises(ValueError, match='skip_unread must be False unless out_type'):
        DyTVisionTransformer(arch=TINY, img_size=32, patch_size=8, skip_unread=True, **vit)


def test_refused_with_a_router_that_reads_all_tokens():
    moe = dict(type='mmdyt.MoEAdapter')
    with pytest.raises(ValueError, match='skip_unread must be False with a MoEAdapter'):
        DyTVisionTransformer(arch=TINY, img_size=32, patch_size=8, skip_unread=True, adapter=moe)


def test_refused_with_a_training_that_sees_inactive_keys():
    with pytest.raises(ValueError, match="skip_unread must be False with training='masked_all_keys'"):
        DyTVisionTransformer(
            arch=TINY, img_size=32, patch_size=8, skip_unread=True, dispatch='attn', training='masked_all_keys'
        )
