"""Layers that feed one level of a decoder share one decision: who decides, every executor, cost, fit, calibration."""

import copy

import pytest
import torch
from static_graphs import export_any_batch, not_static
from test_vit import TINY

from mmdyt.core.fit.calibrate import calibrate, token_dispatchers
from mmdyt.core.fit.evidence import fit_dispatchers
from mmdyt.core.fit.request import RULES, CalibrationRequest
from mmdyt.core.losses import activation_rate
from mmdyt.core.observe import complete_model, decisions, dynamic_branches, random_masks, record_dispatch
from mmdyt.core.window_memory import WindowMemory
from mmdyt.models import DyTVisionTransformer
from mmdyt.parts.dispatcher import TokenDispatcher
from mmdyt.parts.same_decision import SameDecision

LEVELS = [0, 3]  # of four layers: the first decides for itself, the second for the two after it as well
BRANCHES = [('mlp', 'active'), ('attn', 'all'), ('attn_mlp', 'active'), ('layer', 'active'), ('layer', 'all')]
ANY_BRANCH = pytest.mark.parametrize(('dispatch', 'keys'), BRANCHES)


def build(dispatch='mlp', keys='active', **options) -> DyTVisionTransformer:
    torch.manual_seed(0)
    options = dict(decide_per='level', out_indices=LEVELS, out_type='featmap') | options
    arch = dict(TINY, num_layers=4)
    model = DyTVisionTransformer(arch=arch, img_size=32, patch_size=8, dispatch=dispatch, keys=keys, **options).eval()
    generator = torch.Generator().manual_seed(1)
    for branch in dynamic_branches(model).values():
        torch.nn.init.normal_(branch.adapter.up.weight, std=0.5, generator=generator)
    for module in model.modules():
        if isinstance(module, TokenDispatcher):
            torch.nn.init.normal_(module.gate.weight, generator=generator)
    return model


def images(number=3) -> torch.Tensor:
    return torch.randn(number, 3, 32, 48, generator=torch.Generator().manual_seed(2))


def run(model, x):
    with torch.no_grad(), record_dispatch(model) as record:
        return model(x)[-1], record


def loss(features) -> torch.Tensor:
    """Of all levels; a norm leaves the square of the last one as good as constant."""
    generator = torch.Generator().manual_seed(3)
    return sum((level * torch.randn(level.shape, generator=generator)).sum() for level in features)


def by_site(record) -> dict[str, list]:
    """The decisions of one pass in the order of the layers."""
    found = {}
    for name, (dispatch,) in record.dispatches.items():
        found.setdefault(name.split('.')[-1], []).append(dispatch)
    return found


@ANY_BRANCH
@pytest.mark.parametrize('rule', [dict(threshold=0.1), dict(capacity=0.5)], ids=['threshold', 'capacity'])
def test_what_skips_gives_what_masked_gives_on_one_decision(dispatch, keys, rule):
    model, x = build(dispatch, keys), images()
    for dispatcher in token_dispatchers(model).values():
        dispatcher.set_rule(**rule)
    skipping, record = run(model, x)
    for first, *others in by_site(record).values():
        assert others[0] is others[1] is others[2] is not first  # the gather index, too
        assert 0 < others[0].patch_mask.mean() < 1
    for branch in dynamic_branches(model).values():
        branch.inference = 'masked'
    masked, _ = run(model, x)
    torch.testing.assert_close(skipping, masked, rtol=0, atol=1e-5 * masked.abs().max().item())


@ANY_BRANCH
def test_it_is_the_model_whose_layers_are_given_the_same_masks(dispatch, keys):
    shared, x = build(dispatch, keys), images()
    features, record = run(shared, x)
    own = build(dispatch, keys, decide_per='layer')
    own.load_state_dict(shared.state_dict(), strict=False)
    rules = {name: lambda *_, d=dispatch: d for name, (dispatch,) in record.dispatches.items()}
    with decisions(own, rules):
        expected, _ = run(own, x)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)


def test_layers_that_follow_have_no_gate_and_cost_none():
    shared, own = build(), build(decide_per='layer')
    gates = [name for name in shared.state_dict() if 'dispatcher' in name]
    assert sorted({name.split('.')[1] for name in gates}) == ['0', '1']
    cost = [model.macs(32, 48, {}) for model in (shared, own)]
    assert cost[1] - cost[0] == 2 * 32 * 24  # two gates of C = 32 for 24 patch tokens


def test_a_checkpoint_of_each_kind_loads_in_the_other():
    shared, own = build(), build(decide_per='layer')
    result = own.load_state_dict(shared.state_dict(), strict=False)
    assert all('.dispatcher.' in name for name in result.missing_keys) and not result.unexpected_keys
    result = shared.load_state_dict(own.state_dict(), strict=False)
    assert all('.dispatcher.' in name for name in result.unexpected_keys) and not result.missing_keys


@ANY_BRANCH
def test_rules_from_outside_hold_for_all_that_share(dispatch, keys):
    model, x = build(dispatch, keys), images()
    with complete_model(model):
        _, record = run(model, x)
    assert all(d.complete for d in record.flat())
    with random_masks(model, dict.fromkeys(dynamic_branches(model), 0.5)):
        _, record = run(model, x)
    for _, *others in by_site(record).values():
        assert others[0] is others[1] is others[2] and 0.2 < others[0].patch_mask.mean() < 0.8


def test_every_layer_counts_in_the_rate_and_pulls_at_the_shared_gate():
    model, x = build().train(), images()
    with record_dispatch(model) as record:
        model(x)
    rate = activation_rate(record.flat())
    first, second = (record.dispatches[f'layers.{i}.dynamic.mlp'][0].patch_mask.mean() for i in (0, 1))
    torch.testing.assert_close(rate, (first + 3 * second) / 4)
    rate.backward()
    assert all(model.layers[i].dynamic['mlp'].dispatcher.gate.weight.grad.abs().sum() > 0 for i in (0, 1))


@ANY_BRANCH
@pytest.mark.parametrize('training', ['split', 'masked'])
def test_training_on_shared_masks_has_the_gradients_of_own_ones(dispatch, keys, training):
    """Reference: a model in which every layer decides, given the same masks, one leaf for all that share one."""
    shared, x = build(dispatch, keys, training=training), images()
    own = build(dispatch, keys, training=training, decide_per='layer')
    own.load_state_dict(shared.state_dict(), strict=False)
    _, record = run(shared, x)
    leaves = {id(d): d.mask.clone().requires_grad_() for d in record.flat()}  # one for all that share one
    rules = {name: lambda *_, d=d: d.with_mask(leaves[id(d)]) for name, (d,) in record.dispatches.items()}
    gradients = []
    for model in (shared, own):
        model.train()
        torch.manual_seed(4)  # of the adapters' dropout
        with decisions(model, rules):
            gradients.append(torch.autograd.grad(loss(model(x)), list(leaves.values())))
    for mine, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('per_image', [False, True])
def test_calibration_meets_the_rate_of_all_layers(rule, per_image):
    model, x = build(), torch.randn(8, 3, 64, 64)
    found = calibrate(model, [lambda: model(x)], CalibrationRequest(0.4, rule, per_image))
    assert list(found) == list(dynamic_branches(model))
    _, record = run(model, x)
    rates = [d.patch_mask.mean().item() for d in record.flat()]
    assert sum(rates) / 4 == pytest.approx(0.4, abs=0.02) and len({round(rate, 6) for rate in rates[1:]}) == 1


@pytest.mark.parametrize('per_mac', [False, True])
def test_evidence_of_a_shared_mask_is_the_sum_for_each_layer_that_shares(per_mac):
    """Reference: ridge regression of the derivative by one leaf that all of a level are given."""
    model, x = build('layer', 'all'), images(6)
    for dispatcher in token_dispatchers(model).values():
        dispatcher.set_rule(-torch.inf)
    leaves, inputs = {}, {}

    def rule(name, dispatcher, x, state):
        dispatch = dispatcher(x, state)
        leaves[name] = dispatch.mask.detach().clone().requires_grad_()
        inputs[name] = x[:, 1:].detach().flatten(0, 1).double()
        return dispatch.with_mask(leaves[name])

    names = [f'layers.{i}.dynamic.layer' for i in (0, 1)]
    with decisions(model, {name: lambda *a, name=name: rule(name, *a) for name in names}):
        gradients = torch.autograd.grad(loss(model(x)), [leaves[name] for name in names])
    evidence = [gradient[:, 1:, 0].abs().double() for gradient in gradients]
    mean = torch.stack([e.mean(1) for e in evidence]).mean(0)[:, None]
    fit_dispatchers(model, [lambda: loss(model(x))], per_mac=per_mac)
    for name, layers, found in zip(names, (1, 3), evidence, strict=True):
        target = (found / mean + 1e-6).log().flatten()
        centred = inputs[name] - inputs[name].mean(0)
        covariance = centred.T @ centred / len(centred)
        damped = covariance + 1e-3 * covariance.diagonal().mean() * torch.eye(32).double()
        weight = torch.linalg.solve(damped, centred.T @ (target - target.mean()) / len(centred))
        gate = token_dispatchers(model)[name].gate
        torch.testing.assert_close(gate.weight[0].double(), weight, rtol=0, atol=1e-3 * weight.abs().max().item())
        bias = target.mean() - inputs[name].mean(0) @ weight - torch.tensor(float(layers)).log().double()
        torch.testing.assert_close(gate.bias[0].double(), bias, rtol=0, atol=1e-3)  # layers cost alike, per_mac or not


def test_windows_take_over_the_decisions_of_levels():
    model, x = build(), images()
    memory = WindowMemory(model, (32, 64), (8, 8))
    maps = []
    with torch.no_grad(), memory.open(), record_dispatch(model) as record:
        for left in (0, 16):
            memory.move(0, left)
            model(x)
            maps.append([d.patch_mask.view(3, 4, 6) for d in record.flat()])
            assert maps[-1][1] is not None and all(torch.equal(m, maps[-1][1]) for m in maps[-1][1:])
            record.clear()
    for before, after in zip(*maps, strict=True):
        assert torch.equal(before[:, :, 2:], after[:, :, :4])


@pytest.mark.parametrize(('dispatch', 'keys'), [('mlp', 'active'), ('attn_mlp', 'active'), ('layer', 'all')])
def test_unread_tokens_may_be_skipped(dispatch, keys):
    options = dict(out_indices=-1, out_type='cls_token')
    whole, less = (build(dispatch, keys, skip_unread=skip, **options) for skip in (False, True))
    torch.testing.assert_close(run(less, images())[0], run(whole, images())[0], rtol=0, atol=1e-5)
    less.train()(images())


def test_a_copy_follows_its_own_gates():
    model = build()
    twin = copy.deepcopy(model)
    deciders = [branch.dispatcher.decider for branch in dynamic_branches(twin).values()]
    assert deciders[1] is deciders[2] is deciders[3] is twin.layers[1].dynamic['mlp'].dispatcher


def test_replicas_on_several_devices_share_the_decision():
    """As ``nn.DataParallel`` makes them: followers of a replica know the original's gates."""
    model, x = build(), images()
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for name, parameter in module._parameters.items():
            replica._parameters[name] = parameter
            setattr(replica, name, parameter)
    torch.testing.assert_close(run(replicas[model], x)[0], run(model, x)[0], rtol=0, atol=0)


def test_broken_tokens_and_padding_are_those_of_the_decision():
    model, x = build(), images()
    x[1, :, 10, 10] = torch.nan
    _, record = run(model, x)
    _, *others = by_site(record)['mlp']
    assert all(d.patch_mask[1].all() for d in others)


@pytest.mark.parametrize(('dispatch', 'keys'), [('mlp', 'active'), ('layer', 'all')])
def test_a_capacity_is_exported_with_static_shapes(dispatch, keys):
    model = build(dispatch, keys, inference='fixed')
    for dispatcher in token_dispatchers(model).values():
        dispatcher.set_rule(capacity=0.5)
    x = images()
    program = export_any_batch(model, x)
    assert not not_static(program)
    torch.testing.assert_close(program.module()(x)[-1], run(model, x)[0], rtol=0, atol=1e-5)


def test_parts_may_name_who_follows():
    parts = [dict(type='mmdyt.SameDecision', layers=[2, 3])]
    model = build(decide_per='layer', dispatcher=dict(layers=[0, 1]), parts=parts)
    followers = [branch.dispatcher.decider for branch in dynamic_branches(model).values()]
    assert followers[1] is followers[2] is followers[3] and followers[0] is not followers[1]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(decide_per='stage'), "decide_per must be one of ['layer', 'level'], got 'stage'."),
        (dict(dispatcher=dict(layers=[0])), "decide_per must be 'layer' with dispatcher.layers, got [0] with 'level'."),
        (
            dict(dispatcher=None, decide_per='layer', parts=[dict(type='mmdyt.SameDecision')]),
            'layers must not begin with a SameDecision',
        ),
    ],
)
def test_mistakes_are_refused(options, message):
    with pytest.raises(ValueError, match='.') as error:
        build(**options)
    assert message in str(error.value)


def test_a_decision_is_needed_and_must_fit():
    follower = SameDecision(dim=4)
    x = torch.zeros(1, 3, 4)
    with pytest.raises(ValueError, match='state must be that of a pass'):
        follower(x)
