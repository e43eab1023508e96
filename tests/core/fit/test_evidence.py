"""Dispatchers are fitted to what skipping a token costs: derivatives, regression, and what the fit is good for."""

import pytest
import torch
import torch.nn as nn

from mmdyt.parts.adapter import Adapter
from mmdyt.core.branch import DynamicBranch
from mmdyt.core.observe import dynamic_branches
from mmdyt.core.fit.calibrate import calibrate, measured_rates
from mmdyt.parts.dispatcher import RandomDispatcher, TokenDispatcher
from mmdyt.core.fit.calibrate import token_dispatchers
from mmdyt.core.fit.evidence import FLOOR, _Moments, _log_evidence, fit_dispatchers
from mmdyt.models import DyTVisionTransformer

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
        dispatcher.threshold.fill_(-torch.inf)


def skip(model: Residuals, branch: int, image: int, token: int, share: float):
    """Within the context one token's update is multiplied by 1 - share."""

    def change(module, args, dispatch):
        mask = dispatch.mask.clone()
        mask[image, token] -= share
        return dispatch._replace(mask=mask)

    return model.branches[branch].dispatcher.register_forward_hook(change)


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
                handle = skip(model, branch, image, token + 1, share)
                values.append(model(x).sum())
                handle.remove()
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
            dispatcher.threshold.fill_(threshold)
        fit_dispatchers(model, [lambda weight=weight: (model(x) * weight).sum()])
        fits.append(torch.cat([dispatcher.gate.weight for dispatcher in token_dispatchers(model).values()]))
    torch.testing.assert_close(fits[1], fits[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(fits[2], fits[0], rtol=0, atol=1e-4)


def test_the_regression_is_least_squares():
    """Reference: torch.linalg.lstsq on all rows at once."""
    torch.manual_seed(0)
    inputs = torch.randn(50, 3).double() + 2
    outcomes = inputs @ torch.tensor([1.0, -2.0, 0.5]).double() + 3 + 0.1 * torch.randn(50).double()
    moments = _Moments(3, torch.device('cpu'))
    for rows in range(0, 50, 20):
        moments.add(inputs[rows : rows + 20], outcomes[rows : rows + 20])
    weight, bias, explained = moments.solve(1e-12)
    expected = torch.linalg.lstsq(torch.cat([inputs, torch.ones(50, 1)], 1), outcomes[:, None]).solution.flatten()
    torch.testing.assert_close(torch.cat([weight, bias[None]]), expected, rtol=0, atol=1e-6)
    residual = outcomes - inputs @ weight - bias
    assert explained == pytest.approx(1 - (residual.var(correction=0) / outcomes.var(correction=0)).item(), abs=1e-6)


def test_constant_outcomes_and_constant_inputs_are_no_error():
    moments = _Moments(2, torch.device('cpu'))
    moments.add(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([4.0, 4.0]))
    weight, bias, explained = moments.solve(1e-3)
    assert weight.tolist() == [0.0, 0.0] and bias.item() == 4.0 and explained == 0.0


def test_fitted_masks_keep_the_loss_better_than_random_ones():
    model, x = build(), tokens(64)
    for mlp in model.mlps:
        nn.init.normal_(mlp[0].weight[:1])  # tokens differ in what their update is worth
    open_all(model)
    with torch.no_grad():
        complete = model(x)
    fit_dispatchers(model, [lambda: model(x).sum()])
    calibrate(model, [lambda: model(x)], 0.5, 'global')
    with torch.no_grad():
        fitted = (model(x) - complete).abs().mean()
    rates = list(measured_rates(model, [lambda: model(x)]).values())
    for branch, rate in zip(model.branches, rates, strict=True):
        branch.dispatcher = RandomDispatcher(DIM, rate=max(rate, 1e-9))
    with torch.no_grad():
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
    assert not any(dispatcher._forward_hooks for dispatcher in token_dispatchers(model).values())
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


@pytest.mark.parametrize('dispatch', ['mlp', 'attn', 'attn_mlp', 'layer'])
@pytest.mark.parametrize('skip_unread', [False, True])
def test_every_branch_of_a_vit_can_be_fitted(dispatch, skip_unread):
    """But those whose patch tokens nobody reads."""
    torch.manual_seed(0)
    arch = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64)
    vit = DyTVisionTransformer(arch, img_size=32, patch_size=8, dispatch=dispatch, skip_unread=skip_unread).eval()
    images = torch.randn(8, 3, 32, 32)
    open_all(vit)
    explained = fit_dispatchers(vit, [lambda: vit(images)[0].square().sum()])
    branches = list(dynamic_branches(vit))
    unread = [f'layers.2.dynamic.{"mlp" if dispatch == "attn_mlp" else dispatch}']
    assert list(explained) == (branches[:-1] if skip_unread and unread[0].endswith('mlp') else branches)
    worthless = [name for name in branches if name in unread and not skip_unread]
    assert all(explained.get(name, 0) < 1e-6 for name in worthless)  # their own update is not read
    found = calibrate(vit, [lambda: vit(images)], 0.5, 'global')
    assert sum(branch.rate for branch in found.values()) / len(found) == pytest.approx(0.5, abs=0.02)
