import pytest
import torch

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
