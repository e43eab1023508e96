import pytest
import torch
import torch.nn as nn
from doubles import PlainLayer

from mmdyt.core.tuning import merge
from mmdyt.parts.ssf import SSF

MODULES = dict(
    linear=(nn.Linear(4, 6), torch.randn(2, 3, 4)),
    no_bias=(nn.Linear(4, 6, bias=False), torch.randn(2, 3, 4)),
    norm=(nn.LayerNorm(6, eps=0.1), torch.randn(2, 3, 6)),
)


def learnt(part):
    nn.init.normal_(part.gamma)
    nn.init.normal_(part.beta)
    return part


@pytest.mark.parametrize('kind', MODULES)
def test_it_scales_and_shifts_what_a_layer_gives_and_merges_into_it(kind):
    module, x = MODULES[kind]
    part = SSF(6, 4)
    part.wrap(module)
    torch.testing.assert_close(part(x, module.weight, module.bias), module(x))  # a fresh one
    learnt(part)
    out = part(x, module.weight, module.bias)
    torch.testing.assert_close(out, part.gamma * module(x) + part.beta)
    torch.testing.assert_close(part.plain(x, *part.merged(module.weight, module.bias)), out, rtol=1e-5, atol=1e-5)


def test_it_merges_into_the_channels_of_a_convolution():
    conv, x = nn.Conv2d(3, 6, 2, stride=2), torch.randn(2, 3, 8, 8)
    part = learnt(SSF(6, 12))
    part.wrap(conv)
    weight, bias = part.merged(conv.weight, conv.bias)
    expected = part.gamma[:, None, None] * conv(x) + part.beta[:, None, None]
    torch.testing.assert_close(part.plain(x, weight, bias), expected, rtol=1e-5, atol=1e-5)


def test_it_is_behind_every_linear_and_norm_of_a_block():
    layer = PlainLayer(hidden=64)  # an MLP ratio of 4
    SSF.add_to(layer)
    assert sum(p.numel() for p in layer.dynamic.parameters()) == 22 * 16
    for part in layer.modules():
        if isinstance(part, SSF):
            learnt(part)
    x = torch.randn(2, 5, 16)
    out = layer.eval()(x)
    assert merge(layer) == []
    torch.testing.assert_close(layer(x), out, rtol=1e-4, atol=1e-5)


def test_the_published_start_is_drawn_around_the_identity():
    torch.manual_seed(0)
    part = SSF(4096, 4, official=True)
    for parameter, mean in ((part.gamma, 1.0), (part.beta, 0.0)):
        assert parameter.mean().item() == pytest.approx(mean, abs=2e-3)
        assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
