import pytest
import torch
import torch.nn as nn
from doubles import PlainLayer

from mmdyt.core.tuning import merge
from mmdyt.parts.lora import LoRA


def make(**options):
    torch.manual_seed(0)
    part = LoRA(6, 4, **(dict(rank=2, dropout=0.0) | options)).double()
    nn.init.normal_(part.up)
    return part, torch.randn(6, 4).double(), torch.randn(6).double(), torch.randn(3, 5, 4).double()


def test_a_fresh_one_changes_nothing_and_its_update_has_a_gradient():
    part, x = LoRA(6, 4, rank=2), torch.randn(3, 5, 4)
    weight, bias = torch.randn(6, 4), torch.randn(6)
    out = part(x, weight, bias)
    assert torch.equal(out, x @ weight.T + bias)
    out.sum().backward()
    assert part.up.grad.abs().sum() > 0
    assert part.down.abs().max() <= 4**-0.5  # Kaiming-uniform, a = sqrt 5


def test_it_computes_the_equation_and_merges():
    part, weight, bias, x = make(scale=0.5)
    expected = x @ weight.T + bias + 0.5 * x @ part.down.T @ part.up.T
    torch.testing.assert_close(part(x, weight, bias), expected)
    merged, same = part.merged(weight, bias)
    torch.testing.assert_close(x @ merged.T + bias, expected, rtol=0, atol=1e-12)
    assert same is bias
    torch.testing.assert_close(merged - weight, 0.5 * part.up @ part.down)


def test_dropout_is_on_what_it_reads_only():
    part, weight, bias, x = make(dropout=0.999)
    torch.manual_seed(1)
    torch.testing.assert_close(part.train()(x, weight, bias), x @ weight.T + bias, rtol=0, atol=1e-9)


def test_queries_and_values_are_rows_of_one_matrix():
    layer = PlainLayer()
    LoRA.add_to(layer, on='attn.qkv', rows='qv', rank=2)
    layer.eval()
    assert [name for name, _ in layer.dynamic.attn.named_parameters()] == [
        'lora.q.down',
        'lora.q.up',
        'lora.v.down',
        'lora.v.up',
    ]
    for part in layer.dynamic.attn.lora.values():
        nn.init.normal_(part.up)
    before, keys = layer.qkv.weight.clone(), slice(16, 32)
    x = torch.randn(2, 5, 16)
    out = layer(x)
    assert merge(layer) == []
    torch.testing.assert_close(layer(x), out, rtol=0, atol=1e-5)
    assert torch.equal(layer.qkv.weight[keys], before[keys]) and not torch.equal(layer.qkv.weight[:16], before[:16])
    assert [name for name, _ in layer.named_parameters() if 'dynamic' in name] == []


def test_one_for_all_rows_has_as_many_parameters():
    layer = PlainLayer()
    LoRA.add_to(layer, on='attn.qkv', rank=8)
    assert sum(p.numel() for p in layer.dynamic.parameters()) == 8 * 16 + 48 * 8


def test_rows_alone_are_those_of_queries_keys_and_values():
    layer = PlainLayer()
    LoRA.add_to(layer, rows='qkv')
    assert list(layer.dynamic.attn.lora) == ['q', 'k', 'v']


@pytest.mark.parametrize('on', ['linears', ('attn.proj', 'mlp.fc1')])
def test_rows_of_nothing_are_refused(on):
    with pytest.raises(ValueError, match=r"rows must be left out \(None\) unless on names 'attn.qkv', got 'qv'"):
        LoRA.add_to(PlainLayer(), on=on, rows='qv')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(rank=0), 'rank must be a positive integer, got 0'),
        (dict(rank=1.5), 'rank must be a positive integer, got 1.5'),
        (dict(dropout=1), r'dropout must lie in \[0, 1\), got 1'),
        (dict(scale=float('nan')), 'scale must be a finite number, got nan'),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoRA(4, 4, **options)
