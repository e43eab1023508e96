import pytest
import torch

from mmdyt.core import kernels
from mmdyt.core.tokens import TokenState
from mmdyt.parts.adapter import Adapter


def test_fresh_adapter_is_the_zero_map_with_a_gradient():
    adapter = Adapter(16, bottleneck=4)
    x = torch.randn(2, 5, 16)
    out = adapter(x)
    assert torch.equal(out, torch.zeros_like(out))
    adapter(x).sum().backward()
    assert adapter.up.weight.grad.abs().sum() > 0


def test_adapter_computes_equation_1():
    torch.manual_seed(0)
    adapter = Adapter(6, bottleneck=3, scale=0.5, dropout=0.0).double()
    torch.nn.init.normal_(adapter.up.weight)
    torch.nn.init.normal_(adapter.up.bias)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    hidden = torch.clamp(x @ adapter.down.weight.T + adapter.down.bias, min=0)
    expected = 0.5 * (hidden @ adapter.up.weight.T + adapter.up.bias)
    torch.testing.assert_close(adapter(x), expected)


def test_adapter_drops_out_in_training_only():
    adapter = Adapter(32, bottleneck=64, dropout=0.5)
    torch.nn.init.ones_(adapter.up.weight)
    x = torch.randn(1, 3, 32)
    assert not torch.equal(adapter(x), adapter(x))
    adapter.eval()
    assert torch.equal(adapter(x), adapter(x))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_add_update_is_the_sum_on_a_cpu(dtype):
    torch.manual_seed(0)
    adapter = Adapter(16, bottleneck=4).to(dtype).eval()
    torch.nn.init.normal_(adapter.up.weight)
    out, x = torch.randn(2, 2, 5, 16, dtype=dtype)
    before = out.clone()
    with torch.no_grad():
        found, expected = adapter.add_update(out, x, TokenState()), before + adapter(x)
    assert torch.equal(found, expected) and torch.equal(out, before) and not torch.equal(found, out)


@pytest.mark.parametrize('wrong', ['training', 'other', 'weights', 'fp32', 'strided', 'unusable', None])
def test_add_update_takes_the_kernel_only_where_it_computes_the_same(monkeypatch, wrong):
    calls = []
    monkeypatch.setattr(kernels, 'usable', lambda x: wrong != 'unusable')
    monkeypatch.setattr(kernels, 'adapted', lambda *args: calls.append(args) or args[0])
    dtype = torch.float32 if wrong == 'fp32' else torch.bfloat16
    adapter = Adapter(16, bottleneck=4, scale=0.3).to(torch.float32 if wrong == 'weights' else dtype)
    adapter.train(wrong == 'training')
    out, x = torch.randn(2, 2, 5, 16, dtype=dtype)
    if wrong == 'other':
        out = out.float()
    if wrong == 'strided':
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16, enabled=wrong == 'weights'):
        adapter.add_update(out, x, TokenState())
    if wrong is not None:
        assert calls == []
        return
    ((*tensors, scale),) = calls
    down, up = (adapter.down.weight, adapter.down.bias), (adapter.up.weight, adapter.up.bias)
    assert tensors[0] is out and tensors[1] is x and tensors[2:] == [down, up] and scale == 0.3


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(dim=0), 'dim must be at least 1, got 0'),
        (dict(dim=8, bottleneck=0), 'bottleneck must be a positive integer, got 0'),
        (dict(dim=8, bottleneck=0.5), 'bottleneck must be a positive integer, got 0.5'),
        (dict(dim=8, dropout=10), r'dropout must lie in \[0, 1\), got 10'),
        (dict(dim=8, scale=float('nan')), 'scale must be a finite number, got nan'),
    ],
)
def test_adapter_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Adapter(**arguments)
