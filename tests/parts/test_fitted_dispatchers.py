"""Dispatchers are fitted to what skipping a token costs: derivatives, regression, and what the fit is good for."""

import math

import pytest
import torch
import torch.nn as nn
from doubles import PlainLayer

from mmdyt.core import context
from mmdyt.core.branch import DynamicBranch
from mmdyt.core.fit.calibrate import calibrate, measured_rates, token_dispatchers
from mmdyt.core.fit.evidence import FLOOR, _log_evidence, fit_dispatchers
from mmdyt.core.fit.request import RULES, CalibrationRequest
from mmdyt.core.observe import decisions, dynamic_branches, random_masks
from mmdyt.parts.adapter import Adapter
from mmdyt.parts.dispatcher import RandomDispatcher, TokenDispatcher

DIM, PATCHES = 8, 15


class Residuals(nn.Module):
    """Two dispatched branches in a row, and a linear head on the mean of the tokens."""

    def __init__(self, kind=TokenDispatcher, **dispatcher):
        super().__init__()
        self.branches = nn.ModuleList(DynamicBranch(Adapter(DIM, 2), kind(DIM, **dispatcher)) for _ in range(2))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(DIM, 1)

    def forward(self, x):
        for branch, mlp in zip(self.branches, self.mlps, strict=True):
            x = branch(x, lambda tokens, layout, mlp=mlp: mlp(tokens))
        return self.head(x.mean(1).tanh())


def build(**dispatcher) -> Residuals:
    torch.manual_seed(0)
    return Residuals(**dispatcher).eval()


def tokens(number: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.randn(number, PATCHES + 1, DIM, generator=torch.Generator().manual_seed(seed))


def open_all(model: nn.Module) -> None:
    for dispatcher in token_dispatchers(model).values():
        dispatcher.set_rule(-torch.inf)


def skip(model: Residuals, branch: int, image: int, token: int, share: float):
    """Within the context one token's update is multiplied by 1 - share."""

    def rule(dispatcher, x, state):
        dispatch = dispatcher(x, state)
        mask = dispatch.mask.clone()
        mask[image, token] -= share
        return dispatch.with_mask(mask)

    return decisions(model, {f'branches.{branch}': rule})


def test_evidence_is_the_derivative_by_the_mask():
    """Reference: central differences in fp64."""
    model, x = build().double(), tokens(2).double()
    open_all(model)
    for branch in model.branches:
        branch.inference = 'masked'
    with torch.no_grad():
        numeric = torch.zeros(2, 2, PATCHES)  # branch, image, token
        for index in range(numeric.numel()):
            branch, image, token = (int(i) for i in torch.unravel_index(torch.tensor(index), numeric.shape))
            values = []
            for share in (1e-4, -1e-4):
                with skip(model, branch, image, token + 1, share):
                    values.append(model(x).sum())
            numeric[branch, image, token] = (values[1] - values[0]).abs() / 2e-4
    logs = _log_evidence(model, token_dispatchers(model), lambda: model(x).sum())
    relative = numeric / numeric.mean((0, 2), keepdim=True)
    for found, expected in zip(logs.values(), relative, strict=True):
        torch.testing.assert_close(found[1], (expected + FLOOR).log().flatten(), rtol=0, atol=1e-3, check_dtype=False)
        assert found[0].shape == (2 * PATCHES, DIM)


@pytest.mark.parametrize('threshold', [-torch.inf, 0.0])
def test_scale_of_the_loss_and_of_single_images_does_not_matter(threshold):
    model, x = build(), tokens()
    weights = torch.tensor([1.0, 1e-3, 10.0, 0.5])[:, None]
    fits = []
    for weight in (1.0, 1e-4, weights):
        for dispatcher in token_dispatchers(model).values():
            dispatcher.reset_parameters()
            nn.init.constant_(dispatcher.gate.weight, 0.1)
            dispatcher.set_rule(threshold)
        fit_dispatchers(model, [lambda weight=weight: (model(x) * weight).sum()])
        fits.append(torch.cat([dispatcher.gate.weight for dispatcher in token_dispatchers(model).values()]))
    torch.testing.assert_close(fits[1], fits[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(fits[2], fits[0], rtol=0, atol=1e-4)


def test_fitted_masks_keep_the_loss_better_than_random_ones():
    model, x = build(), tokens(64)
    for mlp in model.mlps:
        nn.init.normal_(mlp[0].weight[:1])  # tokens differ in what their update is worth
    open_all(model)
    with torch.no_grad():
        complete = model(x)
    fit_dispatchers(model, [lambda: model(x).sum()])
    calibrate(model, [lambda: model(x)], CalibrationRequest(0.5, 'global'))
    with torch.no_grad():
        fitted = (model(x) - complete).abs().mean()
    with torch.no_grad(), random_masks(model, measured_rates(model, [lambda: model(x)])):
        random = (model(x) - complete).abs().mean()
    assert fitted < 0.8 * random


def test_only_gates_change_and_modes_and_hooks_are_as_before():
    model, x = build(noise=False), tokens()
    model.train()
    model.mlps[1].eval()
    open_all(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    explained = fit_dispatchers(model, [lambda: model(x).sum()] * 2)
    assert list(explained) == list(dynamic_branches(model)) and all(0 < share <= 1 for share in explained.values())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f'branches.{i}.dispatcher.gate.{name}' for i in range(2) for name in ('weight', 'bias')}
    assert [module.training for module in model.modules()] == modes
    assert not any(context.asked_of(context.RULES, b) or b.dispatcher._forward_hooks for b in model.branches)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_image_without_evidence_says_nothing():
    model, x = build(), tokens()
    open_all(model)
    fits = []
    for weight in (torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.ones(2)):
        fit_dispatchers(model, [lambda weight=weight: (model(x[: len(weight)])[:, 0] * weight).sum()])
        fits.append(torch.cat([dispatcher.gate.weight for dispatcher in token_dispatchers(model).values()]))
    torch.testing.assert_close(fits[0], fits[1])


@pytest.mark.parametrize('factor', [0.0, torch.nan, torch.inf])
def test_losses_without_finite_evidence_are_refused_and_change_nothing(factor):
    model, x = build(), tokens()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match='^losses must give finite evidence for some image, got none'):
        fit_dispatchers(model, [lambda: model(x).sum() * factor])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ('model', 'losses', 'message'),
    [
        (build(), [], 'losses must hold at least one loss, got none'),
        (build(), [lambda: torch.ones(())], 'losses must depend on the dispatched branches of the model'),
        (nn.Linear(1, 1), [lambda: torch.ones(())], 'model must have a dispatcher with a threshold'),
        (build(kind=RandomDispatcher), [lambda: torch.ones(())], 'model must have a dispatcher with a threshold'),
    ],
)
def test_bad_arguments_are_refused(model, losses, message):
    with pytest.raises(ValueError, match=f'^{message}'):
        fit_dispatchers(model, losses)


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('calls', range(4))
def test_a_calibration_that_fails_midway_leaves_every_threshold_and_capacity_as_it_was(rule, calls):
    model, x, left = build(), tokens(), [calls]
    for i, dispatcher in enumerate(token_dispatchers(model).values()):
        dispatcher.set_rule(0.1 - i, 0.5 if i else None)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def forward():
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError
        model(x)

    with pytest.raises(MemoryError):
        calibrate(model, [forward], CalibrationRequest(0.4, rule, per_image=True))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [dispatcher.capacity for dispatcher in token_dispatchers(model).values()] == [None, 0.5]


@pytest.mark.parametrize('ridge', [0, -1.0, True, '1', torch.nan, torch.inf])
def test_a_ridge_that_is_no_positive_number_is_refused(ridge):
    with pytest.raises(ValueError, match=f'^ridge must be a positive number, got {ridge!r}'):
        fit_dispatchers(build(), [lambda: 0], ridge)


def test_a_token_that_nobody_reads_saves_its_key_alone():
    layer, n = PlainLayer(8, 32, 'layer'), 16
    saved = layer.macs(layer.expected(n, 1, dict(layer=n), read=1))
    saved -= layer.macs(layer.expected(n, 1, dict(layer=n - 1), read=1))
    assert layer.token_macs('layer', n, read=1) == saved


@pytest.mark.parametrize('keys', ['active', 'all'])
def test_evidence_per_mac_divides_by_what_skipping_saves(keys):
    """Counted by the block itself: what it costs with all tokens, less what it costs with one fewer."""
    layer, x = PlainLayer(8, 32, 'attn_mlp', keys=keys), tokens()
    for site in layer.sites:
        layer.branch(site).add(TokenDispatcher(8, noise=False))
    open_all(layer)
    biases = []
    for per_mac in (False, True):
        fit_dispatchers(layer, [lambda: layer(x).square().sum()], per_mac=per_mac)
        biases.append({site: layer.dynamic[site].dispatcher.gate.bias.item() for site in layer.sites})
    n = x.shape[1]
    everything = layer.macs(layer.expected(n, 1, dict(attn=n, mlp=n)))
    saved = {site: everything - layer.macs(layer.expected(n, 1, {site: n - 1})) for site in layer.sites}
    saved['attn'] += 2 * 8 * (keys == 'active')  # (n - 1)^2 is n^2 - 2 n + 1
    ratio = math.log(saved['mlp'] / saved['attn'])
    moved = {site: biases[0][site] - biases[1][site] for site in layer.sites}
    assert moved['mlp'] - moved['attn'] == pytest.approx(ratio, abs=1e-5)
