import copy

import pytest
import torch
import torch.nn as nn

from mmdyt.parts.adapter import Adapter
from mmdyt.core.branch import DynamicBranch
from mmdyt.core.observe import complete_model, dynamic_branches, record_dispatch
from mmdyt.core.dispatch import Dispatch
from mmdyt.parts.dispatcher import TokenDispatcher
from mmdyt.core.executors import masked, packed, split


class FixedDispatcher(nn.Module):
    """Active tokens chosen by the test."""

    num_prefix_tokens = 1

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return Dispatch(self.mask, None, 1)


def make_branch(dim=16, **arguments):
    branch = DynamicBranch(Adapter(dim, bottleneck=4), TokenDispatcher(dim), **arguments)
    nn.init.normal_(branch.adapter.up.weight)
    nn.init.normal_(branch.dispatcher.gate.weight)
    return branch


class MLP(nn.Sequential):
    """A branch that ignores the layout, as MLPs do."""

    def forward(self, x, layout=None):
        return super().forward(x)


def make_mlp(dim=16):
    return MLP(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


def masks(batch, tokens):
    """None, one, some and all patch tokens active; CLS always."""
    none = torch.zeros(batch, tokens, 1)
    none[:, 0] = 1
    one = none.clone()
    one[-1, tokens // 2] = 1
    some = (torch.rand(batch, tokens, 1) > 0.5).float()
    some[:, 0] = 1
    return dict(none=none, one=one, some=some, all=torch.ones(batch, tokens, 1))


@pytest.mark.parametrize('batch', [1, 2, 5])
@pytest.mark.parametrize('active', ['none', 'one', 'some', 'all'])
def test_packed_equals_masked(batch, active):
    torch.manual_seed(0)
    mlp, mask = make_mlp(), masks(batch, 13)[active]
    x, out = torch.randn(2, batch, 13, 16).unbind()
    with torch.no_grad():
        torch.testing.assert_close(packed(mlp, x, out.clone(), mask), masked(mlp, x, out, mask), rtol=0, atol=1e-6)


def test_packed_writes_into_transposed_tokens_too():
    mlp, mask = make_mlp(), masks(2, 13)['some']
    x = torch.randn(2, 16, 13).transpose(1, 2)  # as a patch embedding without CLS returns them
    with torch.no_grad():
        torch.testing.assert_close(packed(mlp, x, x + 1, mask), masked(mlp, x, x + 1, mask), rtol=0, atol=1e-6)


def test_packed_runs_the_branch_on_active_tokens_only():
    seen = []

    def branch(x, layout):
        seen.append((*x.shape, layout.lengths))
        return x

    mask = masks(2, 7)['one']
    packed(branch, torch.randn(2, 7, 4), torch.zeros(2, 7, 4), mask)
    assert seen == [(1, 3, 4, (1, 2))]  # two CLS tokens and one patch token


def test_packed_without_any_active_token_runs_nothing():
    out = torch.randn(2, 3, 4)
    result = packed(lambda x, layout: 1 / 0, torch.randn(2, 3, 4), out.clone(), torch.zeros(2, 3, 1))
    assert torch.equal(result, out)


def test_branch_computes_equation_6():
    mask = masks(2, 5)['some']
    branch = DynamicBranch(Adapter(16, bottleneck=4, dropout=0.0), FixedDispatcher(mask)).train()
    nn.init.normal_(branch.adapter.up.weight)
    mlp, x = make_mlp(), torch.randn(2, 5, 16)
    torch.testing.assert_close(branch(x, mlp), x + mask * mlp(x) + branch.adapter(x))


def test_gradients_are_those_of_the_equations_in_float64():
    """Reference: eqs. (1), (4) to (6) written out, with the mask a leaf, so that its gradient is eq. (5)'s."""
    torch.manual_seed(0)
    branch, mlp = make_branch().double(), make_mlp().double()
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
    branch, mlp = make_branch().eval(), make_mlp()
    x = torch.randn(2, 5, 16, requires_grad=True)
    out = branch(x, mlp)
    out.sum().backward()  # packed would write in place into a part of the graph
    assert x.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(branch(x, mlp), out)


def test_eval_is_packed_by_default_and_masked_by_name():
    def count(inference):
        seen = []
        with torch.no_grad():
            branch(inference)(torch.randn(2, 8, 16), lambda x, layout: seen.append(x.shape[1]) or x)
        return seen[0]

    def branch(inference):
        return DynamicBranch(Adapter(16), FixedDispatcher(masks(2, 8)['none']), inference).eval()

    assert count('packed') == 2
    assert count('masked') == 8
    with pytest.raises(ValueError, match=r"inference must be one of \['packed', 'masked'\], got 'sparse'"):
        branch('sparse')


def test_complete_model_runs_every_token_nests_and_restores():
    model = nn.ModuleDict(dict(a=make_branch(), b=make_branch())).eval()
    x, mlp = torch.randn(2, 5, 16), make_mlp()
    expected = x + mlp(x) + model['a'].adapter(x)
    with complete_model(model):
        with complete_model(model['a']):
            torch.testing.assert_close(model['a'](x, mlp), expected)
        assert all(branch.complete for branch in model.values())
    assert not any(branch.complete for branch in model.values())
    with pytest.raises(ZeroDivisionError), complete_model(model):
        raise ZeroDivisionError
    assert not any(branch.complete for branch in model.values())


def test_record_dispatch_lists_branches_in_network_order_and_passes_in_time_order():
    model = nn.Sequential(make_branch(), make_branch()).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad(), record_dispatch(model) as record:
        for _ in range(2):
            model[1](model[0](x, make_mlp()), make_mlp())
        with record_dispatch(model[0]) as inner, complete_model(model):
            model[0](x, make_mlp())
    model[0](x, make_mlp())  # after the context: not recorded
    assert record.names == ['0', '1'] == list(dynamic_branches(model))
    assert [len(passes) for passes in record.dispatches.values()] == [3, 2]
    (complete,) = inner.flat()
    assert complete.mask.shape == (2, 5, 1) and complete.mask.eq(1).all() and complete.logits is None
    record.clear()
    assert record.flat() == []


def test_a_copy_made_while_recording_writes_into_no_record():
    model, x = nn.Sequential(make_branch()).eval(), torch.randn(2, 5, 16)
    with torch.no_grad(), record_dispatch(model) as record:
        copy.deepcopy(model)[0](x, make_mlp())
        assert record.flat() == []
        model[0](x, make_mlp())
    assert len(record.flat()) == 1


def test_records_are_closed_after_an_error():
    model = nn.Sequential(make_branch())
    with pytest.raises(ZeroDivisionError), record_dispatch(model):
        raise ZeroDivisionError
    assert model[0]._records == []


def gradients(executor, mlp, x, out, mask):
    parts = [t.detach().clone().requires_grad_(True) for t in (x, out, mask)]
    (executor(mlp, *parts) ** 2).sum().backward()
    return [t.grad for t in parts] + [p.grad for p in mlp.parameters()]


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('active', ['none', 'one', 'some', 'all'])
def test_split_has_the_value_and_every_gradient_of_masked(batch, active):
    """Also those of the branch's own weights, for a base that is tuned."""
    torch.manual_seed(0)
    mlp, mask = make_mlp().double(), masks(batch, 13)[active].double()
    x, out = torch.randn(2, batch, 13, 16, dtype=torch.float64).unbind()
    torch.testing.assert_close(split(mlp, x, out, mask), masked(mlp, x, out, mask), rtol=1e-12, atol=1e-12)
    got = gradients(split, mlp, x, out, mask)
    mlp.zero_grad()
    expected = gradients(masked, mlp, x, out, mask)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-12)
    assert expected[2].abs().min() > 0  # the dispatcher learns from inactive tokens too


def test_split_keeps_no_activations_of_inactive_tokens():
    mlp, x = make_mlp(), torch.randn(2, 13, 16, requires_grad=True)
    rows = []
    mlp[1].register_forward_hook(lambda module, args, output: rows.append((output.shape[1], output.requires_grad)))
    split(mlp, x, x, masks(2, 13)['one'].requires_grad_())
    assert rows == [(3, True), (23, False)]


@pytest.mark.parametrize('active', ['none', 'one', 'some', 'all'])
def test_split_runs_no_inactive_token_where_the_mask_is_not_learnt(active):
    torch.manual_seed(0)
    mlp, mask = make_mlp().double(), masks(3, 13)[active].double()
    rows = []
    handle = mlp[1].register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    x, out = torch.randn(2, 3, 13, 16, dtype=torch.float64, requires_grad=True)
    found = split(mlp, x, out, mask)
    assert rows == [mask.sum().item()]
    handle.remove()
    expected = masked(mlp, x, out, mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    tuned = [x, out, *mlp.parameters()]
    for g, e in zip(
        torch.autograd.grad((found**2).sum(), tuned), torch.autograd.grad((expected**2).sum(), tuned), strict=True
    ):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('kind', ['masked', 'packed'])
def test_without_an_adapter_the_input_is_not_written_into(kind):
    branch = DynamicBranch(None, TokenDispatcher(16), inference=kind).eval()
    nn.init.normal_(branch.dispatcher.gate.weight)
    mlp, x = make_mlp(), torch.randn(2, 9, 16)
    before = x.clone()
    with torch.no_grad():
        out = branch(x, mlp)
        mask = branch.dispatcher(x).mask
        torch.testing.assert_close(out, x + mask * mlp(x))
    assert torch.equal(x, before) and 0 < mask.mean() < 1


def test_without_a_dispatcher_it_is_a_parallel_adapter_and_not_dispatched():
    branch = DynamicBranch(Adapter(16, 4, dropout=0.0), None)
    nn.init.normal_(branch.adapter.up.weight)
    mlp, x = make_mlp(), torch.randn(2, 9, 16)
    for mode in (True, False):
        torch.testing.assert_close(branch.train(mode)(x, mlp), x + branch.adapter(x) + mlp(x))
    assert dynamic_branches(branch) == {}


def test_unknown_training_executor_is_refused():
    with pytest.raises(ValueError, match=r"training must be one of \['masked', 'split', 'masked_all_keys'\], got 'x'"):
        make_branch(training='x')
