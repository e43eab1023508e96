"""Vision Transformers whose tokens halt: against a loop over blocks and tokens, costs, maps, losses, refusals."""

import pytest
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmpretrain.models.backbones import VisionTransformer
from test_methods import arguments, learn
from test_methods_in_hosts import classifier
from test_vit import TINY

import mmdyt.models.classifier  # noqa: F401  registers
from mmdyt.core.fit.calibrate import token_dispatchers
from mmdyt.core.grid import View, on_grid
from mmdyt.core.macs import count_macs
from mmdyt.core.observe import complete_model, dynamic_branches, record_dispatch
from mmdyt.core.padding import showing
from mmdyt.models import DyTVisionTransformer
from mmdyt.preflight.methods import use_method

# isort: split
from mmengine.registry import MODELS
from mmpretrain.structures import DataSample

SIZE, GRID = (32, 48), (4, 6)  # pixels, and patches of 8 pixels
ARCH = dict(TINY, num_layers=4)
HALT = dict(type='mmdyt.HaltingDispatcher')
SCORES = [dict(), dict(score='shared'), dict(score='channel', gamma=2.0, beta=1.0)]


def build(halt=None, bias=-1.0, **options) -> DyTVisionTransformer:
    torch.manual_seed(0)
    sizes = dict(arch=ARCH, img_size=SIZE, patch_size=8, dispatch='layer', dispatcher=HALT | (halt or {}))
    model = DyTVisionTransformer(**(sizes | options))
    model.init_weights()
    for name, parameter in model.named_parameters():
        if 'gate' in name or 'adapter.up' in name:
            nn.init.normal_(parameter, std=0.3)
        if 'gate.bias' in name:
            nn.init.constant_(parameter, bias)
    return model.double().eval()


def images(number=3) -> torch.Tensor:
    return torch.randn(number, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def run(model, x=None):
    return model(images() if x is None else x)[-1]


@torch.no_grad()
def by_hand(model, image, maps='halting'):
    """What mmpretrain's blocks give of the tokens that still run: features (N, C), and how many blocks each ran."""
    plain = VisionTransformer(ARCH, img_size=SIZE, patch_size=8, out_type='raw').double()
    plain.eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if 'dynamic' not in k})
    tokens, _ = model._embed(image[None])
    tokens, depth = tokens[0], len(plain.layers)
    totals, ran, means = [0.0] * len(tokens), [0] * len(tokens), torch.zeros_like(tokens)
    halted = [False] * len(tokens)
    for i, layer in enumerate(plain.layers):
        rows = [row for row in range(len(tokens)) if not halted[row] or row == 0]  # the class token stays
        before = tokens[rows]
        tokens[rows] = layer(before[None])[0]
        if (adapter := getattr(model.layers[i].dynamic['layer'], 'adapter', None)) is not None:
            tokens[rows] += adapter(before)
        for row in rows:
            if halted[row]:
                continue
            score = 1.0 if i == depth - 1 else model.layers[i + 1].dynamic['layer'].dispatcher.score(tokens[row]).item()
            halted[row] = totals[row] + score >= 0.99
            means[row] += (1 - totals[row] if halted[row] else score) * tokens[row]
            totals[row], ran[row] = totals[row] + score, i + 1
    tokens[0] = means[0]
    return plain.ln1(means if maps == 'mean' else tokens), torch.tensor(ran)


@pytest.mark.parametrize('inference', ['auto', 'masked'])
@pytest.mark.parametrize('adapter', [None, dict(type='mmdyt.Adapter', bottleneck=4)], ids=['frozen', 'adapter'])
@pytest.mark.parametrize('halt', [*SCORES, dict(maps='mean')], ids=str)
def test_features_and_masks_are_those_of_a_loop_over_tokens(halt, adapter, inference):
    model = build(halt, out_type='raw', adapter=adapter, inference=inference)
    with record_dispatch(model) as record:
        out = run(model)
    masks = torch.cat([dispatch.mask for dispatch in record.flat()], dim=-1)  # (B, N, L)
    assert 0.1 < masks[:, 1:, 1:].mean() < 0.9
    for image, found, mask in zip(images(), out, masks, strict=True):
        expected, ran = by_hand(model, image, halt.get('maps'))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        assert torch.equal(mask[1:].sum(-1), ran[1:].double()) and mask[0].all()
        assert (mask[:, 1:] <= mask[:, :-1]).all()  # no token comes back


@pytest.mark.parametrize('halt', [dict(), dict(maps='mean')], ids=str)
@pytest.mark.parametrize('out_type', ['cls_token', 'raw', 'featmap', 'avg_featmap'])
def test_where_every_score_is_zero_the_network_is_the_dense_one(out_type, halt):
    model = build(halt, bias=-torch.inf, out_type=out_type, adapter=None)
    plain = build(out_type=out_type, adapter=None, dispatcher=None)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if 'dispatcher' not in k})
    torch.testing.assert_close(run(model), run(plain), rtol=0, atol=1e-12)
    halting = build(halt, out_type=out_type, adapter=None)
    with complete_model(halting):
        assert torch.equal(run(halting), run(plain))
    assert not torch.allclose(run(halting), run(plain), atol=1e-3)


@pytest.mark.parametrize('skip_unread', [False, True])
def test_an_image_does_not_depend_on_its_batch(skip_unread):
    model = build(skip_unread=skip_unread)
    together = run(model)
    for i in range(3):
        torch.testing.assert_close(run(model, images()[i : i + 1]), together[i : i + 1], rtol=0, atol=1e-10)
    torch.testing.assert_close(run(build()), together, rtol=0, atol=1e-10)


@pytest.mark.parametrize('halt', SCORES, ids=str)
@pytest.mark.parametrize('parts', [[], ['Prompts'], ['AdapterPlus'], ['LoRA']], ids=str)
@pytest.mark.parametrize('skip_unread', [False, True])
def test_costs_are_those_of_the_operator_counter_image_by_image(halt, parts, skip_unread):
    model = build(halt, parts=[dict(type=f'mmdyt.{name}') for name in parts], skip_unread=skip_unread)
    with record_dispatch(model) as record:
        run(model)
    runs = {name: passes[0] for name, passes in record.runs.items()}
    macs = model.macs_of(GRID[0] * GRID[1], runs)
    assert macs.tolist() == [count_macs(lambda x=x: run(model, x[None])) for x in images()]
    active = {name: passes[0].mask.sum((1, 2)) for name, passes in record.dispatches.items()}
    torch.testing.assert_close(model.macs(*SIZE, active), macs)
    assert macs.max() < model.macs(*SIZE, {})
    with complete_model(model), record_dispatch(model) as record:  # whose gates are not asked
        whole = count_macs(lambda: run(model, images(1)))
    assert model.macs_of(24, {name: passes[0] for name, passes in record.runs.items()}) == whole


def test_masked_inference_is_billed_for_all_tokens():
    model = build(inference='masked')
    with record_dispatch(model) as record:
        run(model)
    assert model.macs_of(24, {name: passes[0] for name, passes in record.runs.items()}) == model.macs(*SIZE, {})


def test_tokens_in_padding_run_no_block_and_change_nothing():
    model, x = build(out_type='featmap', adapter=None), images(2)
    views = [View(SIZE, (8, 8)), View((32, 32), (8, 8))]  # of the second image two columns of patches are padding
    with showing(lambda rows: views), record_dispatch(model) as record:
        out = run(model, x)
    masks = on_grid(record.flat(), GRID)
    assert not masks[:, 1, :, 4:].any() and masks[0, 1, :, :4].all() and masks[0, 0].all()
    x[1, :, :, 32:] += 1.0
    with showing(lambda rows: views):
        torch.testing.assert_close(run(model, x)[1, :, :, :4], out[1, :, :, :4], rtol=0, atol=1e-10)
    ran = {name: passes[0] for name, passes in record.runs.items()}
    dense = model.dense_macs(*SIZE, torch.tensor([0, 8]))
    assert (model.macs_of(24 - torch.tensor([0, 8]), ran) < dense).all()


def test_a_map_has_the_values_at_halting_and_its_gates_learn_in_training():
    model = build(out_type='featmap', final_norm=False, out_indices=[0, 1, 2, 3])
    with record_dispatch(model) as record, torch.no_grad():
        levels = torch.stack(model(images()))  # (L, B, C, rows, columns), what each block gave
    ran = on_grid(record.flat(), GRID).sum(0)  # (B, rows, columns)
    assert {2, 3, 4} <= set(ran.flatten().tolist())
    last = (ran.long() - 1)[None, :, None].expand(1, -1, levels.shape[2], -1, -1)
    assert torch.equal(levels[3], levels.gather(0, last)[0])
    model.apply(lambda module: setattr(module, 'p', 0.0) if isinstance(module, nn.Dropout) else None)
    trained = model.train()(images())[-1]
    torch.testing.assert_close(trained, levels[3], rtol=0, atol=1e-10)
    trained.square().mean().backward()
    for branch in list(dynamic_branches(model).values())[1:]:
        assert branch.dispatcher.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize('score', ['layer', 'shared'])
def test_a_classifier_trains_all_that_halts_and_nothing_frozen(score):
    backbone = arguments('avit', score=score)
    cfg, scope = classifier(backbone)
    cfg |= dict(rate_weight=0.0, complete_weight=0.0, distill_weight=0.0)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(cfg)
        model.init_weights()
    inputs, samples = torch.randn(2, 3, 32, 32), [DataSample().set_gt_label(i) for i in range(2)]
    losses = model.train().loss(inputs, samples)
    assert {'loss_ponder', 'loss_prior', 'halting_depth', 'activation_rate'} <= losses.keys()
    assert losses['halting_depth'] == len(model.backbone.layers) and losses['activation_rate'] == 1
    total, log = model.parse_losses(losses)
    expected = sum(losses[key] for key in ('loss', 'loss_ponder', 'loss_prior'))
    assert total.item() == pytest.approx(expected.item()) and log['halting_depth'] == losses['halting_depth']
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        if 'gate' in name:
            assert parameter.grad.abs().sum() > 0, name
    assert any('gate' in name for name, _ in model.named_parameters())
    with complete_model(model):
        assert not {'loss_ponder', 'loss_prior'} & model.loss(inputs, samples).keys()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(dispatch='mlp'), "dispatch must be 'layer', and keys 'active', with a HaltingDispatcher, got 'mlp'"),
        (dict(keys='all'), "dispatch must be 'layer', and keys 'active', with a HaltingDispatcher"),
        (dict(halt=dict(layers=[1, 2])), 'in every layer behind the first that has one, got none in layer 3'),
        (dict(halt=dict(layers=[0, 2, 3])), 'in every layer behind the first that has one, got none in layer 1'),
        (dict(decide_per='level', out_indices=[1, 3]), 'first that has one, got a SameDecision in layer 1'),
        (dict(substitute=dict(type='mmdyt.MeanUpdate')), 'HaltingDispatcher beside a MeanUpdate'),
        (dict(adapter=dict(type='mmdyt.MoEAdapter')), 'HaltingDispatcher beside a MoEAdapter'),
        (dict(adapter=None, parts=[dict(type='mmdyt.DenseAdapter')]), 'HaltingDispatcher beside a DenseAdapter'),
        (dict(parts=[dict(type='mmdyt.ToMe')]), "dispatch must not be 'layer' with a ToMe"),
        (dict(parts=[dict(type='mmdyt.HaltedOutput')]), 'which a HaltingDispatcher brings along'),
        (dict(halt=dict(depth=3)), 'parts must not set depth of a HaltingDispatcher'),
        (dict(halt=dict(eps=2)), 'eps must lie in'),
    ],
    ids=str,
)
def test_what_cannot_halt_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_halting_may_begin_later():
    model = build(dict(layers=[2, 3], eps=0.3), bias=0.0)
    assert list(dynamic_branches(model)) == ['layers.2.dynamic.layer', 'layers.3.dynamic.layer']
    with record_dispatch(model) as record:
        run(model)
    first, second = (dispatch.patch_mask for dispatch in record.flat())
    assert 0.1 < first.mean() < 0.9 and (second <= first).all()
    losses = dynamic_branches(model)['layers.3.dynamic.layer'].dispatcher.losses(record.flat())
    assert losses['halting_depth'] == pytest.approx(2 + (first + second).mean().item())


def test_a_rate_is_refused_by_name():
    with pytest.raises(ValueError, match='a TokenDispatcher, got a HaltingDispatcher, which has none'):
        token_dispatchers(build())


def test_no_weight_of_a_loss_stays_where_another_method_takes_its_place():
    cfg = Config(dict(model=dict(type='mmdyt.DyTImageClassifier', backbone=dict(type='mmdyt.DyTVisionTransformer'))))
    use_method(cfg, 'avit', dict(ponder_weight=0.1))
    assert cfg.model.backbone.dispatcher == HALT | dict(ponder_weight=0.1) and cfg.model.backbone.dispatch == 'layer'
    assert (cfg.model.rate_weight, cfg.model.complete_weight, cfg.model.distill_weight) == (0.0, 0.0, 0.0)
    use_method(cfg, 'dyt')
    assert 'rate_weight' not in cfg.model and cfg.model.backbone.dispatcher == dict(type='mmdyt.TokenDispatcher')


def test_learned_halting_survives_a_checkpoint():
    model = learn(build(dict(score='shared')))
    again = build(dict(score='shared'))
    assert again.load_state_dict(model.state_dict()).missing_keys == []
    assert torch.equal(run(again), run(model))
