"""Adapter, frozen branch and dispatcher together: eqs. (1) to (6) of Dynamic Tuning."""

import pytest
import torch
import torch.nn as nn
from doubles import MLP, Fixed

from mmdyt.core.branch import DynamicBranch
from mmdyt.core.observe import dynamic_branches
from mmdyt.parts.adapter import Adapter
from mmdyt.parts.dispatcher import TokenDispatcher


def make_branch(dim=16, **arguments):
    branch = DynamicBranch(Adapter(dim, bottleneck=4), TokenDispatcher(dim), **arguments)
    nn.init.normal_(branch.adapter.up.weight)
    nn.init.normal_(branch.dispatcher.gate.weight)
    return branch


def test_branch_computes_equation_6():
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 0, 0, 0]]).float()[..., None]
    branch = DynamicBranch(Adapter(16, bottleneck=4, dropout=0.0), Fixed(mask)).train()
    nn.init.normal_(branch.adapter.up.weight)
    mlp, x = MLP(16), torch.randn(2, 5, 16)
    torch.testing.assert_close(branch(x, mlp), x + mask * mlp(x) + branch.adapter(x))


def test_gradients_are_those_of_the_equations_in_float64():
    """Reference: eqs. (1), (4) to (6) written out, with the mask a leaf, so that its gradient is eq. (5)'s."""
    torch.manual_seed(0)
    branch, mlp = make_branch().double(), MLP(16).double()
    branch.adapter.dropout.p = 0.0
    x = torch.randn(3, 6, 16, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 6, 16, dtype=torch.float64)
    torch.manual_seed(1)
    (branch(x, mlp) * target).sum().backward()
    grads = [x.grad, branch.adapter.down.weight.grad, branch.dispatcher.gate.weight.grad]

    torch.manual_seed(1)
    xr = x.detach().clone().requires_grad_()
    down, up = branch.adapter.down, branch.adapter.up
    w_down, w_gate = down.weight.detach().clone().requires_grad_(), branch.dispatcher.gate.weight.detach().clone()
    w_gate.requires_grad_()
    logits = xr[:, 1:] @ w_gate.T + branch.dispatcher.gate.bias
    g1 = -torch.empty_like(logits).exponential_().log()
    g2 = -torch.empty_like(logits).exponential_().log()
    score = torch.sigmoid((logits + g1 - g2) / branch.dispatcher.tau)
    mask = (score > 0.5).double().requires_grad_()  # a leaf
    update = mlp(xr)
    adapted = 0.1 * (torch.relu(xr @ w_down.T + down.bias) @ up.weight.T + up.bias)
    y = xr + adapted + torch.cat([torch.ones_like(mask[:, :1]), mask], 1) * update
    loss = (y * target).sum()
    (mask_grad,) = torch.autograd.grad(loss, mask, retain_graph=True)
    loss.backward(retain_graph=True)
    score.backward(mask_grad)  # backward as if the soft score had been the mask
    for got, expected in zip(grads, [xr.grad, w_down.grad, w_gate.grad], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_eval_with_gradients_enabled_uses_the_masked_executor():
    branch, mlp = make_branch().eval(), MLP(16)
    x = torch.randn(2, 5, 16, requires_grad=True)
    out = branch(x, mlp)
    out.sum().backward()  # packed would write in place into a part of the graph
    assert x.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(branch(x, mlp), out)


@pytest.mark.parametrize('kind', ['masked', 'packed'])
def test_without_an_adapter_the_input_is_not_written_into(kind):
    branch = DynamicBranch(TokenDispatcher(16), inference=kind).eval()
    nn.init.normal_(branch.dispatcher.gate.weight)
    mlp, x = MLP(16), torch.randn(2, 9, 16)
    before = x.clone()
    with torch.no_grad():
        out = branch(x, mlp)
        mask = branch.dispatcher(x).mask
        torch.testing.assert_close(out, x + mask * mlp(x))
    assert torch.equal(x, before) and 0 < mask.mean() < 1


def test_without_a_dispatcher_it_is_a_parallel_adapter_and_not_dispatched():
    branch = DynamicBranch(Adapter(16, 4, dropout=0.0))
    nn.init.normal_(branch.adapter.up.weight)
    mlp, x = MLP(16), torch.randn(2, 9, 16)
    for mode in (True, False):
        torch.testing.assert_close(branch.train(mode)(x, mlp), x + branch.adapter(x) + mlp(x))
    assert dynamic_branches(branch) == {}
