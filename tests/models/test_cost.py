"""What a Vision Transformer costs: the published counts, and an operator counter on whatever its layers are."""

import pytest
import torch
from mmpretrain.models.backbones import VisionTransformer
from test_vit import TINY, make_pair, spread_masks
from test_vit_variants import EVERY, use

from mmdyt.core.macs import count_macs
from mmdyt.core.observe import complete_model, dynamic_branches, record_dispatch
from mmdyt.models import DyTVisionTransformer

C, CLASSES = 768, 1000


def vit_b(**options) -> DyTVisionTransformer:
    with torch.device('meta'):
        return DyTVisionTransformer('base', img_size=224, **options)


def at(model, count) -> dict:
    """The same count of active tokens in every dispatched branch."""
    return dict.fromkeys(dynamic_branches(model), count)


def giga(macs: float) -> float:
    return (macs + C * CLASSES) / 1e9  # the paper counts the linear head too


@pytest.mark.parametrize(
    ('bottleneck', 'rate', 'expected'),
    # arXiv 2403.11808's counter, ViT-B/16 at 224, 1000 classes; 17.8169, printed there cut to 17.816
    [(64, 1.0, 17.817), (64, 0.5, 12.263), (8, 0.5, 12.060)],
)
def test_the_closed_form_gives_the_published_counts(bottleneck, rate, expected):
    model = vit_b(adapter=dict(bottleneck=bottleneck))
    macs = model.macs(224, 224, at(model, 1 + rate * 196))
    assert giga(macs) == pytest.approx(expected, abs=5e-4)


def test_dense_is_the_plain_vit():
    assert giga(vit_b().dense_macs(224, 224)) == pytest.approx(17.58, abs=5e-3)


@pytest.mark.parametrize('dispatch', ['attn_mlp', 'layer'])
def test_counts_in_single_precision_lose_no_multiply_add(dispatch):
    model, counts = vit_b(dispatch=dispatch), [1.0, 101.0, 196.0]
    batched = model.macs(224, 224, at(model, torch.tensor(counts)))
    assert batched.tolist() == [model.macs(224, 224, at(model, k)) for k in counts]


@pytest.mark.parametrize(
    ('count', 'got'),
    [(torch.tensor([197.0, 198.0]), '197 to 198'), (198, '198 to 198'), (-1, '-1 to -1'), (float('nan'), 'nan to nan')],
)
def test_impossible_counts_are_refused(count, got):
    model = vit_b()
    message = rf'active must hold counts in \[0, 197\], got {got}\. They include prefix tokens\.'
    with pytest.raises(ValueError, match=f'^{message}$'):
        model.macs(224, 224, at(model, 100) | {'layers.3.dynamic.mlp': count})


UNLIKE = [dict(feedforward_channels=width) for width in (16, 64, 96)]
LAYERS = [
    dict(layer_cfgs=UNLIKE),
    dict(layer_cfgs=dict(ffn_type='swiglu_fused')),
    dict(layer_cfgs=[dict(ffn_type='swiglu_fused'), *UNLIKE[1:]]),
    dict(layer_cfgs=[dict(ffn_type='swiglu_fused'), {}, {}]),
    dict(layer_cfgs=[{}, dict(ffn_type='swiglu_fused', feedforward_channels=50), {}]),  # 33, rounded up to 40
    dict(drop_rate=0.1, drop_path_rate=0.3, layer_scale_init_value=0.1),
    dict(layer_cfgs=UNLIKE, qkv_bias=False, pre_norm=True, final_norm=False),
]


def make(dispatch, **vit):
    _, model = make_pair(dispatch=dispatch, **dict(out_type='raw') | vit)
    spread_masks(model)
    return model


def billed(model, record, height: int, width: int) -> float:
    """MACs of a batch of 3, from what its branches ran."""
    runs = {name: passes[0] for name, passes in record.runs.items()}
    macs = model.macs_of(model.num_patches(height, width), runs)
    return torch.as_tensor(macs).double().expand(3).sum().item()


@EVERY
@pytest.mark.parametrize('vit', LAYERS, ids=str)
@torch.no_grad()
def test_layers_that_differ_are_billed_as_the_operators_that_ran(dispatch, vit):
    model, x = make(dispatch, **vit), torch.randn(3, 3, 30, 45)
    with record_dispatch(model) as record:
        counted = count_macs(lambda: model(x))
    assert all(0 < d.patch_mask.mean() < 1 for d in record.flat()) and model.layers[0].branches()
    active = {name: passes[0].mask.sum(dim=(1, 2)) for name, passes in record.dispatches.items()}
    assert counted == billed(model, record, 30, 45) == model.macs(30, 45, active).sum().item()
    assert counted < 3 * model.macs(30, 45, {})


@pytest.mark.parametrize('vit', LAYERS, ids=str)
@torch.no_grad()
def test_dense_macs_of_layers_that_differ_are_those_of_the_plain_vit(vit):
    plain, model = make_pair(**vit)
    assert count_macs(lambda: plain(torch.randn(1, 3, 32, 32))) == model.dense_macs(32, 32)


@EVERY
@pytest.mark.parametrize('how', ['masked', 'gradients', 'complete'])
@torch.no_grad()
def test_what_skips_nothing_is_billed_as_if_all_were_active(dispatch, how):
    """Also an evaluation with gradients, which runs the masked executor: operators that ran, and the closed form."""
    model, x = make(dispatch), torch.randn(3, 3, 32, 40)
    if how == 'masked':
        use(model, 'inference', 'masked')
    decided = complete_model(model) if how == 'complete' else torch.no_grad()

    def run():
        with torch.set_grad_enabled(how == 'gradients'):
            model(x)

    with decided, record_dispatch(model) as record:
        counted = count_macs(run)
    assert counted == billed(model, record, 32, 40)
    gates = len(dynamic_branches(model)) * 20 * 32 if how == 'complete' else 0  # dispatchers are not asked
    assert counted == 3 * (model.macs(32, 40, {}) - gates)
    assert (how == 'complete') == all(d.patch_mask.all() for d in record.flat())


def test_a_plain_vit_costs_what_it_is_and_nothing_more():
    model = DyTVisionTransformer(arch=TINY, img_size=32, patch_size=8, adapter=None, dispatcher=None)
    plain = VisionTransformer(arch=TINY, img_size=32, patch_size=8)
    assert model.macs(32, 32, {}) == model.dense_macs(32, 32)
    assert count_macs(lambda: plain(torch.randn(1, 3, 32, 32))) == model.dense_macs(32, 32)


VARIANTS = [('mlp', 'active'), ('layer', 'active'), ('layer', 'all'), ('attn', 'all')]


@pytest.mark.parametrize('break_even', [None, 0.5])
@pytest.mark.parametrize('skip_unread', [False, True])
@pytest.mark.parametrize('capacity', [0.0, 0.5, 1.0])
@pytest.mark.parametrize(('dispatch', 'keys'), VARIANTS)
def test_capacities_cost_what_is_expected_and_what_operators_count(dispatch, keys, capacity, skip_unread, break_even):
    """Gates that are trained too, which below a class token have nothing to decide in inference."""
    options = dict(keys=keys, skip_unread=skip_unread, break_even=break_even)
    model = DyTVisionTransformer(TINY, dispatch=dispatch, img_size=32, patch_size=8, **options).eval()
    for branch in dynamic_branches(model).values():
        branch.dispatcher.set_rule(capacity=capacity)
    with torch.no_grad(), record_dispatch(model) as record:
        counted = count_macs(lambda: model(torch.randn(3, 3, 32, 32)))
    assert counted == billed(model, record, 32, 32) == 3 * model.macs_at(32, 32, capacity)
