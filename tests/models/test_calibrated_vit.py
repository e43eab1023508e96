"""Thresholds meet the rate that was asked for, on the images that they were chosen on and on others."""

import copy
import math

import pytest
import torch
import torch.nn as nn
from mmengine.runner import load_state_dict

from mmdyt.core.fit.calibrate import calibrate, measured_rates, threshold_for, token_dispatchers
from mmdyt.core.fit.request import RULES, CalibrationRequest
from mmdyt.core.observe import complete_model, dynamic_branches, record_dispatch
from mmdyt.models import DyTVisionTransformer
from mmdyt.parts.dispatcher import TokenDispatcher

LAYERS, PATCHES = 4, 64
ARCH = dict(embed_dims=32, num_layers=LAYERS, num_heads=2, feedforward_channels=64)


def build(kind='TokenDispatcher', noise=True, **vit) -> nn.Module:
    """A ViT whose layers open from nearly all to few of their tokens, and listen to the former ones."""
    torch.manual_seed(0)
    dispatcher = dict(type=f'mmdyt.{kind}', noise=noise)
    model = DyTVisionTransformer(ARCH, img_size=64, patch_size=8, dispatcher=dispatcher, **vit).eval()
    branches = dynamic_branches(model)
    for i, branch in enumerate(branches.values()):
        nn.init.normal_(branch.adapter.up.weight, std=0.5)
        nn.init.normal_(branch.dispatcher.gate.weight, std=0.6)
        nn.init.constant_(branch.dispatcher.gate.bias, 1.5 - 3 * i / len(branches))
    return model


def images(number: int, seed: int) -> torch.Tensor:
    """Images of different contrast."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(number, 3, 64, 64, generator=generator)
    return noise * (0.5 + torch.rand(number, 1, 1, 1, generator=generator) / 2)


def passes(model: nn.Module, number: int = 64, seed: int = 1) -> list:
    return [lambda batch=batch: model(batch) for batch in images(number, seed).split(16)]


def mean(rates) -> float:
    return sum(rates) / len(rates)


def rates_of(found) -> list[float]:
    return [branch.rate for branch in found.values()]


def thresholds(model: nn.Module) -> list[float]:
    return [dispatcher.threshold.item() for dispatcher in token_dispatchers(model).values()]


def assert_packed_equals_masked(model: nn.Module) -> None:
    outputs = []
    for kind in ('packed', 'masked'):
        for branch in dynamic_branches(model).values():
            branch.inference = kind
        with torch.no_grad():
            outputs += model(images(4, seed=3))
    torch.testing.assert_close(*outputs, rtol=0, atol=2e-5)


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('target', [0.3, 0.7, 0.9])
def test_the_rate_is_met_on_the_calibration_images_and_on_others(rule, target):
    model = build()
    drifted = mean(measured_rates(model, passes(model)).values())
    found = calibrate(model, passes(model), CalibrationRequest(target, rule))
    exact = 1e-3 if rule == 'global' else 0.51 / (64 * PATCHES)  # half a token
    assert mean(rates_of(found)) == pytest.approx(target, abs=exact)
    held_out = mean(measured_rates(model, passes(model, 128, seed=2)).values())
    assert held_out == pytest.approx(target, abs=0.02)
    assert abs(drifted - target) > 0.02


@pytest.mark.parametrize('rule', RULES)
def test_returns_what_was_set_and_measured(rule):
    model = build()
    found = calibrate(model, passes(model), CalibrationRequest(0.4, rule))
    assert list(found) == list(dynamic_branches(model)) == [f'layers.{i}.dynamic.mlp' for i in range(LAYERS)]
    assert [branch.threshold for branch in found.values()] == thresholds(model)
    assert {name: branch.rate for name, branch in found.items()} == measured_rates(model, passes(model))


def test_uniform_gives_every_layer_the_rate():
    model = build()
    found = calibrate(model, passes(model), CalibrationRequest(0.3, 'uniform'))
    assert rates_of(found) == pytest.approx([0.3] * LAYERS, abs=0.51 / (64 * PATCHES))
    assert len(set(thresholds(model))) == LAYERS


def test_global_gives_every_layer_the_same_threshold():
    model = build()
    found = calibrate(model, passes(model), CalibrationRequest(0.3, 'global'))
    assert len(set(thresholds(model))) == 1
    assert max(rates_of(found)) - min(rates_of(found)) > 0.1


@pytest.mark.parametrize('target', [0.1, 0.5, 0.9])
def test_global_takes_few_passes(target):
    """Images cost more than arithmetic: bisection would take some 15."""
    model, calls = build(), []
    forwards = [lambda: calls.append(1) or model(images(64, 1))]
    calibrate(model, forwards, CalibrationRequest(target, 'global'))
    assert len(calls) <= 8


def test_rate_matched_keeps_the_shares_of_training():
    """Reference: the rates of masks that training itself draws, many times."""
    model = build()
    forwards = passes(model, 32)
    for module in [branch.dispatcher for branch in dynamic_branches(model).values()]:
        module.training = True
    drawn = torch.zeros(LAYERS)
    masks = []
    for branch in dynamic_branches(model).values():
        branch.dispatcher.register_forward_hook(lambda module, args, dispatch: masks.append(dispatch.patch_mask.mean()))
    with torch.no_grad():
        for _ in range(10):
            for forward in forwards:
                forward()
    drawn = torch.stack(masks).view(-1, LAYERS).mean(0)
    found = calibrate(model, forwards, CalibrationRequest(drawn.mean().item()))  # the rate that training has: no offset
    assert drawn.max() - drawn.min() > 0.2
    assert rates_of(found) == pytest.approx(drawn.tolist(), abs=0.02)
    more = rates_of(calibrate(model, forwards, CalibrationRequest(0.9)))
    assert mean(more) == pytest.approx(0.9, abs=1e-3)
    assert all(0 <= before < after < 1 for before, after in zip(drawn.tolist(), more, strict=True))
    assert sorted(range(LAYERS), key=more.__getitem__) == drawn.argsort().tolist()  # closed ones stay the closed ones


def test_layers_are_set_in_network_order():
    """With thresholds that each fit the logits of the former thresholds, later layers would miss their rate."""
    model = build()
    logits = {}
    for name, dispatcher in token_dispatchers(model).items():
        dispatcher.register_forward_hook(
            lambda module, args, dispatch, name=name: logits.setdefault(name, []).append(dispatch.logits.flatten())
        )
    with torch.no_grad():
        for forward in passes(model):
            forward()
    naive = {name: threshold_for(torch.cat(values), 0.1) for name, values in logits.items()}
    for name, dispatcher in token_dispatchers(model).items():
        dispatcher.set_rule(naive[name])
    assert max(abs(rate - 0.1) for rate in measured_rates(model, passes(model)).values()) > 0.01
    found = calibrate(model, passes(model), CalibrationRequest(0.1, 'uniform'))
    assert rates_of(found) == pytest.approx([0.1] * LAYERS, abs=0.51 / (64 * PATCHES))


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('noise', [True, False])
def test_present_thresholds_modes_and_random_states_do_not_matter(rule, noise):
    model = build(noise=noise)
    expected = calibrate(model, passes(model), CalibrationRequest(0.4, rule))
    for dispatcher in token_dispatchers(model).values():
        dispatcher.set_rule(3.0)
    model.train()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert calibrate(model, passes(model), CalibrationRequest(0.4, rule)) == expected
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes


def test_modes_are_restored_after_an_error():
    model = build().train()
    with pytest.raises(ZeroDivisionError):
        calibrate(model, [lambda: 1 / 0], CalibrationRequest(0.5))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize('rule', RULES)
def test_a_rate_of_one_runs_every_token_of_every_image(rule):
    model = build()
    found = calibrate(model, passes(model), CalibrationRequest(1.0, rule))
    assert set(found.values()) == {(-math.inf, 1.0, None)}
    assert set(measured_rates(model, passes(model, seed=2)).values()) == {1.0}


@pytest.mark.parametrize('dispatch', ['mlp', 'attn', 'attn_mlp', 'layer'])
def test_packed_equals_masked_at_any_thresholds(dispatch):
    model = build(dispatch=dispatch)
    for rule, target in (('uniform', 0.1), ('rate_matched', 0.5), ('global', 0.9), ('uniform', 1.0)):
        found = calibrate(model, passes(model, 16), CalibrationRequest(target, rule))
        assert len(found) == LAYERS * (2 if dispatch == 'attn_mlp' else 1)
        assert_packed_equals_masked(model)


def test_the_complete_model_is_not_affected():
    model, x = build(), images(4, seed=3)
    with torch.no_grad(), complete_model(model):
        (before,) = model(x)
    calibrate(model, passes(model), CalibrationRequest(0.2))
    with torch.no_grad(), complete_model(model):
        (after,) = model(x)
    assert torch.equal(before, after)


def test_one_decision_per_image_is_calibrated_in_whole_images():
    model = build('SampleDispatcher')
    found = calibrate(model, passes(model), CalibrationRequest(0.25, 'uniform'))
    assert rates_of(found) == [0.25] * LAYERS  # 16 of 64 images


@pytest.mark.parametrize('rule', RULES)
def test_a_layer_without_patch_tokens_is_left_out_and_left_alone(rule):
    model = build(skip_unread=True)
    model.layers[-1].dynamic['mlp'].dispatcher.set_rule(7.0)
    found = calibrate(model, passes(model), CalibrationRequest(0.3, rule))
    assert list(found) == [f'layers.{i}.dynamic.mlp' for i in range(LAYERS - 1)]
    assert mean(rates_of(found)) == pytest.approx(0.3, abs=1e-3)
    assert thresholds(model)[-1] == 7.0


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = build().to(dtype)
    forwards = [lambda batch=batch: model(batch) for batch in images(32, seed=1).to(dtype).split(16)]
    found = calibrate(model, forwards, CalibrationRequest(0.4))
    assert token_dispatchers(model)['layers.0.dynamic.mlp'].threshold.dtype == dtype
    assert mean(rates_of(found)) == pytest.approx(0.4, abs=0.01)  # the thresholds are rounded
    assert [branch.threshold for branch in found.values()] == thresholds(model)


def test_thresholds_survive_save_and_load_and_copies(tmp_path):
    model = build()
    found = calibrate(model, passes(model), CalibrationRequest(0.4))
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    other = build()
    other.load_state_dict(torch.load(tmp_path / 'model.pth', weights_only=True))
    assert thresholds(other) == thresholds(copy.deepcopy(model)) == [branch.threshold for branch in found.values()]
    assert list(measured_rates(other, passes(other)).values()) == rates_of(found)


def test_only_thresholds_change():
    model = build()
    before = copy.deepcopy(model.state_dict())
    calibrate(model, passes(model), CalibrationRequest(0.4))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f'layers.{i}.dynamic.mlp.dispatcher.threshold' for i in range(LAYERS)}


def capacities(model: nn.Module) -> list:
    return [dispatcher.capacity for dispatcher in token_dispatchers(model).values()]


def rates_by_image(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(L, B)."""
    with torch.no_grad(), record_dispatch(model) as record:
        model(x)
    return torch.stack([dispatch.patch_mask.mean(dim=(1, 2)) for dispatch in record.flat()])


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('target', [0.3, 0.7])
def test_per_image_every_image_has_the_rate_whatever_it_shows(rule, target):
    model, others = build(), 3 * images(8, seed=5) + 1
    shared = rates_of(calibrate(model, passes(model), CalibrationRequest(target, rule)))
    assert capacities(model) == [None] * LAYERS
    assert rates_by_image(model, others).mean() != pytest.approx(target, abs=0.02)  # these look different
    found = calibrate(model, passes(model), CalibrationRequest(target, rule, per_image=True))
    assert capacities(model) == [branch.capacity for branch in found.values()] == shared
    expected = torch.tensor([round(share * PATCHES) / PATCHES for share in shared])
    assert torch.equal(rates_by_image(model, others), expected[:, None].expand(-1, 8))
    assert rates_of(found) == expected.tolist()
    assert expected.mean() == pytest.approx(target, abs=0.5 / PATCHES)


@pytest.mark.parametrize('dispatch', ['mlp', 'attn', 'attn_mlp', 'layer'])
def test_packed_equals_masked_at_any_capacities(dispatch):
    model = build(dispatch=dispatch)
    for capacity in (0.0, 0.3, 1.0):
        for dispatcher in token_dispatchers(model).values():
            dispatcher.set_rule(capacity=capacity)
        assert_packed_equals_masked(model)


def test_capacities_survive_save_and_load_and_copies_and_leave_with_others(tmp_path):
    model = build()
    before = copy.deepcopy(model.state_dict())
    calibrate(model, passes(model), CalibrationRequest(0.4, per_image=True))
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    other = build()
    for load in (nn.Module.load_state_dict, load_state_dict):  # torch's, mmengine's
        result = load(other, torch.load(tmp_path / 'model.pth', weights_only=True), strict=True)
        assert result is None or not (result.missing_keys or result.unexpected_keys)
        assert capacities(other) == capacities(model) == capacities(copy.deepcopy(model)) != [None] * LAYERS
        load(other, before, strict=True)
        assert capacities(other) == [None] * LAYERS
    calibrate(model, passes(model), CalibrationRequest(0.4))
    assert capacities(model) == [None] * LAYERS


@pytest.mark.parametrize('prefix', ['', '0.'])
def test_a_gate_from_before_thresholds_loads_strictly_through_mmengine_too(prefix):
    old = {f'{prefix}{name}': tensor for name, tensor in TokenDispatcher(8).state_dict().items() if name != 'threshold'}
    names = list(old)
    dispatcher = TokenDispatcher(8)
    dispatcher.set_rule(1.0)
    load_state_dict(nn.Sequential(dispatcher) if prefix else dispatcher, old, strict=True)
    assert dispatcher.threshold.item() == 0
    assert torch.equal(dispatcher.gate.weight, old[f'{prefix}gate.weight'])
    assert list(old) == names


def test_training_keeps_thresholds_and_capacities_and_new_parameters_forget_them():
    """A pass in training mode (a look at a loss, say) must not undo a calibration; the scores of a new gate must."""
    model = build()
    calibrate(model, passes(model), CalibrationRequest(0.4, per_image=True))
    before = capacities(model), thresholds(model)
    model.train()(images(2, seed=3))
    assert (capacities(model), thresholds(model)) == before and None not in capacities(model)
    for branch in dynamic_branches(model).values():
        branch.reset_parameters()
    assert (capacities(model), thresholds(model)) == ([None] * LAYERS, [0.0] * LAYERS)


def test_one_decision_per_image_cannot_be_met_in_every_image():
    model = build('SampleDispatcher')
    with pytest.raises(ValueError, match='per_image must be False with the SampleDispatcher of layers.0.dynamic.mlp'):
        calibrate(model, passes(model), CalibrationRequest(0.25, per_image=True))


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('bias', [-3.0, 0.0, 3.0])
def test_constant_logits_end_all_or_none(rule, bias):
    model = build()
    for dispatcher in token_dispatchers(model).values():
        nn.init.zeros_(dispatcher.gate.weight)
        nn.init.constant_(dispatcher.gate.bias, bias)
    assert set(rates_of(calibrate(model, passes(model, 16), CalibrationRequest(0.6, rule)))) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(forwards=[]), 'forwards must hold at least one forward pass, got none'),
        (dict(forwards=[lambda: None]), 'forwards must run the model, dispatched, on images .* got none'),
        (dict(model=nn.Linear(1, 1)), 'model must have a dispatcher with a threshold, a TokenDispatcher, got none'),
        (dict(request=CalibrationRequest()), 'target_rate must be given, got None'),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    model = build()
    with pytest.raises(ValueError, match=f'^{message}'):
        calibrate(**(dict(model=model, forwards=passes(model), request=CalibrationRequest(0.5)) | arguments))
    assert thresholds(model) == [0.0] * LAYERS


@pytest.mark.parametrize('rule', RULES)
def test_what_has_no_logits_or_no_finite_ones_is_refused_and_left_alone(rule):
    model = build()
    with complete_model(model), pytest.raises(ValueError, match='forwards must run the model, dispatched'):
        calibrate(model, passes(model), CalibrationRequest(0.5, rule))
    random = DyTVisionTransformer(ARCH, img_size=64, dispatcher=dict(type='mmdyt.RandomDispatcher'))
    with pytest.raises(ValueError, match='model must have a dispatcher with a threshold'):
        calibrate(random, passes(random), CalibrationRequest(0.5, rule))
    nn.init.constant_(model.layers[2].dynamic['mlp'].dispatcher.gate.bias, math.nan)
    with pytest.raises(ValueError, match=r'logits must be finite, got nan or inf in layers\.2\.dynamic\.mlp'):
        calibrate(model, passes(model), CalibrationRequest(0.5, rule))
    assert thresholds(model) == [0.0] * LAYERS
