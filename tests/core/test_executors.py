"""How a branch runs on a mask: each executor gives what the masked one gives, for less."""

import pytest
import torch
from doubles import MLP

from mmdyt.core import kernels
from mmdyt.core.dispatch import Dispatch
from mmdyt.core.executors import masked, packed, split


def decided(mask):
    """A decision about tokens of which one is a prefix."""
    return Dispatch(mask, None, 1)


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
    mlp, mask = MLP(16), masks(batch, 13)[active]
    x, out = torch.randn(2, batch, 13, 16).unbind()
    with torch.no_grad():
        torch.testing.assert_close(
            packed(mlp, x, out.clone(), decided(mask)), masked(mlp, x, out, decided(mask)), rtol=0, atol=1e-6
        )


def test_packed_writes_into_transposed_tokens_too():
    mlp, mask = MLP(16), masks(2, 13)['some']
    x = torch.randn(2, 16, 13).transpose(1, 2)  # as a patch embedding without CLS returns them
    with torch.no_grad():
        torch.testing.assert_close(
            packed(mlp, x, x + 1, decided(mask)), masked(mlp, x, x + 1, decided(mask)), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize('batch', [1, 2])  # of one image the transposed tokens can be flattened without a copy
@pytest.mark.parametrize('transposed', [False, True])
def test_packed_adds_by_the_kernel_where_that_is_usable(monkeypatch, transposed, batch):
    calls = []

    def add_rows(out, rows, update):
        assert out.is_contiguous() and out.shape == (batch * 13, 16) and update.shape == (len(rows), 16)
        calls.append(rows)
        return out.index_add_(0, rows, update)

    monkeypatch.setattr(kernels, 'usable', lambda x: True)
    monkeypatch.setattr(kernels, 'add_rows', add_rows)
    mlp, mask = MLP(16), masks(batch, 13)['some']
    x = torch.randn(batch, 16, 13).transpose(1, 2) if transposed else torch.randn(batch, 13, 16)
    with torch.no_grad():
        found = packed(mlp, x, x + 1, decided(mask))
        torch.testing.assert_close(found, masked(mlp, x, x + 1, decided(mask)), rtol=0, atol=1e-6)
    (rows,) = calls
    assert torch.equal(rows, mask.flatten().nonzero().squeeze(1))


def test_packed_runs_the_branch_on_active_tokens_only():
    seen = []

    def branch(x, layout):
        seen.append((*x.shape, layout.lengths()))
        return x

    mask = masks(2, 7)['one']
    packed(branch, torch.randn(2, 7, 4), torch.zeros(2, 7, 4), decided(mask))
    assert seen == [(1, 3, 4, (1, 2))]  # two CLS tokens and one patch token


def test_packed_without_any_active_token_runs_nothing():
    out = torch.randn(2, 3, 4)
    result = packed(lambda x, layout: 1 / 0, torch.randn(2, 3, 4), out.clone(), decided(torch.zeros(2, 3, 1)))
    assert torch.equal(result, out)


def gradients(executor, mlp, x, out, mask):
    parts = [t.detach().clone().requires_grad_(True) for t in (x, out, mask)]
    (executor(mlp, *parts[:2], decided(parts[2])) ** 2).sum().backward()
    return [t.grad for t in parts] + [p.grad for p in mlp.parameters()]


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('active', ['none', 'one', 'some', 'all'])
def test_split_has_the_value_and_every_gradient_of_masked(batch, active):
    """Also those of the branch's own weights, for a base that is tuned."""
    torch.manual_seed(0)
    mlp, mask = MLP(16).double(), masks(batch, 13)[active].double()
    x, out = torch.randn(2, batch, 13, 16, dtype=torch.float64).unbind()
    torch.testing.assert_close(
        split(mlp, x, out, decided(mask)), masked(mlp, x, out, decided(mask)), rtol=1e-12, atol=1e-12
    )
    got = gradients(split, mlp, x, out, mask)
    mlp.zero_grad()
    expected = gradients(masked, mlp, x, out, mask)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-12)
    assert expected[2].abs().min() > 0  # the dispatcher learns from inactive tokens too


def test_split_keeps_no_activations_of_inactive_tokens():
    mlp, x = MLP(16), torch.randn(2, 13, 16, requires_grad=True)
    rows = []
    mlp[1].register_forward_hook(lambda module, args, output: rows.append((output.shape[1], output.requires_grad)))
    split(mlp, x, x, decided(masks(2, 13)['one'].requires_grad_()))
    assert rows == [(3, True), (23, False)]


@pytest.mark.parametrize('active', ['none', 'one', 'some', 'all'])
def test_split_runs_no_inactive_token_where_the_mask_is_not_learnt(active):
    torch.manual_seed(0)
    mlp, mask = MLP(16).double(), masks(3, 13)[active].double()
    rows = []
    handle = mlp[1].register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    x, out = torch.randn(2, 3, 13, 16, dtype=torch.float64, requires_grad=True)
    found = split(mlp, x, out, decided(mask))
    assert rows == [mask.sum().item()]
    handle.remove()
    expected = masked(mlp, x, out, decided(mask))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    tuned = [x, out, *mlp.parameters()]
    for g, e in zip(
        torch.autograd.grad((found**2).sum(), tuned), torch.autograd.grad((expected**2).sum(), tuned), strict=True
    ):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-12)
