"""What inactive tokens get instead of the branch: the equation, its mean, and what it leaves alone."""

import pytest
import torch
import torch.nn as nn
from doubles import Fixed

from mmdyt.core.attention import Layout
from mmdyt.core.branch import DynamicBranch
from mmdyt.core.fit.evidence import FLOOR, _log_evidence
from mmdyt.core.fit.mean_update import fit_mean_updates
from mmdyt.core.observe import complete_model, dynamic_branches
from mmdyt.core.tokens import TokenState
from mmdyt.parts.adapter import Adapter
from mmdyt.parts.dispatcher import TokenDispatcher
from mmdyt.parts.mean_update import MeanUpdate

DIM = 8


class MLP(nn.Sequential):
    """A branch that knows of the layout only which leading tokens are wanted, as MLPs do."""

    def forward(self, x, layout: Layout):
        return super().forward(layout.queries(x))


def make_branch(**arguments) -> DynamicBranch:
    torch.manual_seed(0)
    branch = DynamicBranch(Adapter(DIM, 2), TokenDispatcher(DIM), MeanUpdate(DIM), **arguments)
    for weight in (branch.adapter.up.weight, branch.dispatcher.gate.weight, branch.substitute.value):
        nn.init.normal_(weight)
    return branch.double()


def make_mlp() -> MLP:
    return MLP(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)).double()


@pytest.mark.parametrize('executor', ['packed', 'masked'])
@pytest.mark.parametrize('read', [None, 1])
def test_inactive_tokens_get_it_and_active_ones_the_branch(executor, read):
    branch, mlp, x = make_branch(inference=executor).eval(), make_mlp(), torch.randn(3, 7, DIM).double()
    with torch.no_grad():
        mask = branch.dispatcher(x).mask
        expected = x + branch.adapter(x) + torch.where(mask > 0, mlp(x, Layout()), branch.substitute.value)
        torch.testing.assert_close(branch(x, mlp, TokenState(read=read)), expected[:, :read])
    assert 0 < mask[:, 1:].mean() < 1


@pytest.mark.parametrize('executor', ['masked', 'split'])
def test_the_gradient_of_a_mask_is_what_the_token_gains_over_it(executor):
    """By the equation: the derivative of the sum of outputs by a mask is the sum over C of branch minus substitute."""
    torch.manual_seed(0)
    mask = (torch.rand(2, 7, 1) > 0.5).double()
    mask[:, 0] = 1
    mask.requires_grad_()
    branch, mlp = DynamicBranch(MeanUpdate(DIM), Fixed(mask), training=executor).double().train(), make_mlp()
    nn.init.normal_(branch.substitute.value)
    x = torch.randn(2, 7, DIM).double()
    branch(x, mlp).sum().backward()
    expected = (mlp(x, Layout()) - branch.substitute.value).sum(-1, keepdim=True)
    torch.testing.assert_close(mask.grad, expected.detach())
    inactive = 14 - mask.detach().sum()
    torch.testing.assert_close(branch.substitute.value.grad, inactive.expand(DIM))


def test_a_fresh_one_changes_nothing():
    branch, mlp, x = make_branch().eval(), make_mlp(), torch.randn(3, 7, DIM).double()
    plain = DynamicBranch(branch.adapter, branch.dispatcher).eval()
    with torch.no_grad():
        assert not torch.equal(branch(x, mlp), plain(x, mlp))
        branch.reset_parameters()
        assert torch.equal(branch(x, mlp), plain(x, mlp))


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
    fit_mean_updates(model, [lambda: model(tokens)])
    torch.testing.assert_close(model.branch.substitute.value.detach(), torch.ones(DIM).double())
    logs = {name: values for name, (_, values, _) in _log_evidence(model, found, lambda: model(tokens)).items()}
    torch.testing.assert_close(logs['branch'].exp(), torch.full((18,), FLOOR).double())
    assert logs['other'].exp().mean() > 1


def test_prompts_are_not_in_the_mean():
    """Tokens that parts inserted are always active: what they gain nobody has to do without."""
    branch, tokens = make_branch().eval(), torch.randn(3, 9, DIM).double()
    state = TokenState(prefix=1, prompts=2)
    update = torch.randn(3, 9, DIM).double()
    assert fit_mean_updates(branch, [lambda: branch(tokens, lambda x, layout: update, state)]) == ['']
    torch.testing.assert_close(branch.substitute.value.detach(), update[:, 3:].flatten(0, 1).mean(0))


def test_the_mean_can_be_set():
    branch, mean = make_branch(), torch.randn(DIM).double()
    branch.substitute.set_mean(mean)
    assert torch.equal(branch.substitute.value, mean) and branch.substitute.value.requires_grad


def test_the_complete_model_gives_nobody_a_substitute():
    branch, mlp, x = make_branch().eval(), make_mlp(), torch.randn(3, 7, DIM).double()
    with complete_model(branch):
        torch.testing.assert_close(branch(x, mlp), x + branch.adapter(x) + mlp(x, Layout()))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match='dim must be at least 1, got 0.'):
        MeanUpdate(0)
