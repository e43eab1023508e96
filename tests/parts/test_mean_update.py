"""What inactive tokens get instead of the branch: the equation, its mean, and what it leaves alone."""

import copy

import pytest
import torch
import torch.nn as nn

from mmdyt.parts.adapter import Adapter
from mmdyt.core.attention import Layout
from mmdyt.core.branch import DynamicBranch
from mmdyt.core.observe import complete_model, dynamic_branches, watch_updates
from mmdyt.core.dispatch import Dispatch
from mmdyt.parts.dispatcher import TokenDispatcher
from mmdyt.core.fit.evidence import FLOOR, _log_evidence
from mmdyt.core.fit.mean_update import fit_mean_updates as fit_substitutes
from mmdyt.parts.mean_update import MeanUpdate
from mmdyt.models import DyTVisionTransformer

DIM = 8


class MLP(nn.Sequential):
    """A branch that knows of the layout only which leading tokens are wanted, as MLPs do."""

    def forward(self, x, layout: Layout):
        return super().forward(layout.queries(x))


def make_branch(**arguments) -> DynamicBranch:
    torch.manual_seed(0)
    branch = DynamicBranch(Adapter(DIM, 2), TokenDispatcher(DIM), substitute=MeanUpdate(DIM), **arguments)
    for weight in (branch.adapter.up.weight, branch.dispatcher.gate.weight, branch.substitute.value):
        nn.init.normal_(weight)
    return branch.double()


def make_mlp() -> MLP:
    return MLP(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)).double()


def make_vit(**arguments) -> DyTVisionTransformer:
    torch.manual_seed(0)
    arch = dict(embed_dims=DIM, num_layers=3, num_heads=2, feedforward_channels=16)
    substitute = dict(type='mmdyt.MeanUpdate')
    model = DyTVisionTransformer(arch, img_size=64, out_type='raw', substitute=substitute, **arguments)
    model.init_weights()
    for branch in dynamic_branches(model).values():
        nn.init.normal_(branch.adapter.up.weight)
        nn.init.normal_(branch.dispatcher.gate.weight)
    return model.eval()


def images(number: int = 3) -> torch.Tensor:
    return torch.randn(number, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('executor', ['packed', 'masked'])
@pytest.mark.parametrize('read', [None, 1])
def test_inactive_tokens_get_it_and_active_ones_the_branch(executor, read):
    branch, mlp, x = make_branch(inference=executor).eval(), make_mlp(), torch.randn(3, 7, DIM).double()
    with torch.no_grad():
        mask = branch.dispatcher(x).mask
        expected = x + branch.adapter(x) + torch.where(mask > 0, mlp(x, Layout()), branch.substitute.value)
        torch.testing.assert_close(branch(x, mlp, read), expected[:, :read])
    assert 0 < mask[:, 1:].mean() < 1


@pytest.mark.parametrize('executor', ['masked', 'split'])
def test_the_gradient_of_a_mask_is_what_the_token_gains_over_it(executor):
    """By the equation: the derivative of the sum of outputs by a mask is the sum over C of branch minus substitute."""
    branch, mlp = make_branch(training=executor).train(), make_mlp()
    x = torch.randn(2, 7, DIM).double()
    mask = (torch.rand(2, 7, 1) > 0.5).double()
    mask[:, 0] = 1
    mask.requires_grad_()

    class Fixed(nn.Module):
        num_prefix_tokens = 1

        def forward(self, tokens):
            return Dispatch(mask, None, 1)

    branch.dispatcher = Fixed()
    branch.adapter = None
    branch(x, mlp).sum().backward()
    expected = (mlp(x, Layout()) - branch.substitute.value).sum(-1, keepdim=True)
    torch.testing.assert_close(mask.grad, expected.detach())
    inactive = 14 - mask.detach().sum()
    torch.testing.assert_close(branch.substitute.value.grad, inactive.expand(DIM))


def test_a_fresh_one_changes_nothing():
    branch, mlp, x = make_branch().eval(), make_mlp(), torch.randn(3, 7, DIM).double()
    plain = copy.deepcopy(branch)
    plain.substitute = None
    with torch.no_grad():
        assert not torch.equal(branch(x, mlp), plain(x, mlp))
        branch.reset_parameters()
        plain.adapter, plain.dispatcher = branch.adapter, branch.dispatcher
        assert torch.equal(branch(x, mlp), plain(x, mlp))


@pytest.mark.parametrize('dispatch', ['mlp', 'attn', 'attn_mlp', 'layer'])
def test_the_fit_is_the_mean_update_of_patch_tokens(dispatch):
    model = make_vit(dispatch=dispatch)
    updates = {}

    def keep(name, update):
        updates.setdefault(name, []).append(update[:, 1:])

    batches = [images(3), images(2) + 1]
    with torch.no_grad(), complete_model(model), watch_updates(model, keep):
        for batch in batches:
            model(batch)
    fitted = fit_substitutes(model, [lambda batch=batch: model(batch) for batch in batches])
    assert fitted == list(updates) == list(dynamic_branches(model))
    for name, branch in dynamic_branches(model).items():
        expected = torch.cat(updates[name]).flatten(0, 1).mean(0)
        torch.testing.assert_close(branch.substitute.value.detach(), expected, atol=1e-6, rtol=1e-5)


def test_the_fit_is_of_all_tokens_whatever_mode_and_masks():
    model = make_vit()
    fit_substitutes(model, [lambda: model(images())])
    first = {name: branch.substitute.value.clone() for name, branch in dynamic_branches(model).items()}
    model.train()
    for branch in dynamic_branches(model).values():
        branch.dispatcher.threshold.fill_(torch.inf)
    fit_substitutes(model, [lambda: model(images())])
    assert model.training
    for name, branch in dynamic_branches(model).items():
        assert torch.equal(branch.substitute.value, first[name])


def test_a_last_layer_that_reads_the_class_token_only_is_left_out():
    model = make_vit(skip_unread=False)
    model.layers[-1].read = 1
    fitted = fit_substitutes(model, [lambda: model(images())])
    assert fitted == list(dynamic_branches(model))[:-1]
    assert not dynamic_branches(model)['layers.2.dynamic.mlp'].substitute.value.any()


def test_models_without_one_are_left_alone():
    model = make_vit()
    for branch in dynamic_branches(model).values():
        branch.substitute = None
    assert fit_substitutes(model, [lambda: pytest.fail('ran for nothing')]) == []


@pytest.mark.parametrize('dispatch', ['mlp', 'attn', 'attn_mlp', 'layer'])
def test_packed_equals_masked(dispatch):
    packed, masked = (make_vit(dispatch=dispatch, inference=executor) for executor in ('packed', 'masked'))
    fit_substitutes(packed, [lambda: packed(images())])
    masked.load_state_dict(packed.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(packed(images())[0], masked(images())[0], atol=1e-6, rtol=1e-5)


def test_the_complete_model_is_not_affected():
    model = make_vit()
    with torch.no_grad(), complete_model(model):
        before = model(images())[0]
        fit_substitutes(model, [lambda: model(images())])
        assert torch.equal(model(images())[0], before)


def test_a_token_that_gains_nothing_over_it_has_no_evidence():
    """The evidence of a mask is that of branch minus substitute: a branch that gives all tokens the same has none."""

    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch, self.other = make_branch(), make_branch()
            self.mlp, self.head = make_mlp(), nn.Linear(DIM, 1).double()

        def forward(self, x):
            x = self.branch(x, lambda tokens, layout: torch.ones_like(tokens))
            return self.head(self.other(x, self.mlp)).square().mean()

    model = Same().eval()
    found = {name: branch.dispatcher for name, branch in dynamic_branches(model).items()}
    tokens = torch.randn(3, 7, DIM).double()
    fit_substitutes(model, [lambda: model(tokens)])
    torch.testing.assert_close(model.branch.substitute.value.detach(), torch.ones(DIM).double())
    logs = {name: values for name, (_, values) in _log_evidence(model, found, lambda: model(tokens)).items()}
    torch.testing.assert_close(logs['branch'].exp(), torch.full((18,), FLOOR).double())
    assert logs['other'].exp().mean() > 1


def test_is_named_tuned_and_saved():
    model = make_vit()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sum(name.endswith('.dynamic.mlp.substitute.value') for name in names) == 3
    model = make_vit(tuned=['adapter'])
    assert not any('substitute' in name for name, p in model.named_parameters() if p.requires_grad)


def test_watchers_see_nothing_afterwards_even_after_an_error():
    model, seen = make_vit(), []
    with pytest.raises(RuntimeError), complete_model(model), watch_updates(model, lambda *args: seen.append(args)):
        raise RuntimeError
    with complete_model(model):
        model(images())
    assert not seen


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match='dim must be at least 1, got 0.'):
        MeanUpdate(0)
    with pytest.raises(ValueError, match='substitute must be None without a dispatcher'):
        make_vit(dispatcher=None)
    with pytest.raises(ValueError, match="substitute must be a config or None, got 'mean'."):
        DyTVisionTransformer('deit-tiny', substitute='mean')
