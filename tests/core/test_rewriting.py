"""Frozen linears and norms are rewritten by name, in the order in which parts were added, and merge back."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from doubles import PlainLayer

from mmdyt.core.macs import count_macs
from mmdyt.core.observe import record_dispatch
from mmdyt.core.part import Rewrite
from mmdyt.core.rewriting import thirds
from mmdyt.core.tokens import TokenState
from mmdyt.core.tuning import merge, set_tuned


class Scale(Rewrite):
    """Multiplies every row of the weight."""

    word = 'scale'
    only_linears = False
    targets = ('mlp.fc1',)

    def __init__(self, out_features: int, in_features: int):
        super().__init__(out_features, in_features)
        self.factor = nn.Parameter(torch.rand(out_features) + 0.5)

    def forward(self, x, weight, bias):
        return self.plain(x, *self.merged(weight, bias))

    def merged(self, weight, bias):
        return self.factor.view(-1, *[1] * (weight.dim() - 1)) * weight, bias


class Beside(Rewrite):
    """A second linear beside the frozen one, without a merged form."""

    word = 'beside'

    def __init__(self, out_features: int, in_features: int):
        super().__init__(out_features, in_features)
        self.linear = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x, weight, bias):
        return F.linear(x, weight, bias) + self.linear(x)

    def macs_per_token(self) -> int:
        return self.linear.weight.numel()


def build(*kinds: type[Rewrite], dispatch: str = 'mlp', **options) -> PlainLayer:
    torch.manual_seed(0)
    layer = PlainLayer(dispatch=dispatch)
    for kind in kinds:
        kind.add_to(layer, **options)
    set_tuned(layer)
    return layer.double().eval()


def tokens() -> torch.Tensor:
    return torch.randn(1, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def places(layer: nn.Module) -> list[str]:
    return [name for name, module in layer.named_modules() if isinstance(module, Rewrite)]


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (dict(), ['mlp.scale.fc1']),
        (dict(on='attn.qkv'), ['attn.scale.qkv']),
        (dict(on='attn.qkv', rows='qv'), ['attn.scale.q', 'attn.scale.v']),
        (dict(on='attn.k'), ['attn.scale.k']),
        (dict(on=['mlp.fc2', 'attn.norm']), ['attn.scale.norm', 'mlp.scale.fc2']),
        (dict(on='linears'), [f'attn.scale.{n}' for n in ('q', 'k', 'v', 'proj')] + ['mlp.scale.fc1', 'mlp.scale.fc2']),
        (
            dict(on='all'),
            [f'attn.scale.{n}' for n in ('norm', 'q', 'k', 'v', 'proj')]
            + [f'mlp.scale.{n}' for n in ('norm', 'fc1', 'fc2')],
        ),
        (dict(on='norm.final'), []),  # the backbone's
    ],
)
def test_names_and_groups_are_resolved(options, expected):
    assert places(build(Scale, **options)) == [f'dynamic.{place}' for place in expected]


@pytest.mark.parametrize('rows', ['q', 'qv', 'qkv', None])
def test_rows_are_rewritten_alone(rows):
    """Reference: the projection by hand, the others as they were."""
    layer, x = build(Scale, on='attn.qkv', rows=rows), tokens()
    weight = layer.qkv.weight.clone()
    for name, rewrite in layer.dynamic['attn'].scale.items():
        part = layer.locate(f'attn.{name}')[1]
        weight[part] = rewrite.factor[:, None] * weight[part]
    expected = F.linear(x, weight, layer.qkv.bias).chunk(3, dim=-1)
    for found, wanted in zip(layer.project(x, 'qkv'), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    for found, wanted in zip(layer.project(x, 'kv'), expected[1:], strict=True):
        torch.testing.assert_close(found, wanted)


def test_parts_act_in_the_order_in_which_they_were_added():
    layer, x = build(Scale, Beside, on='mlp.fc1'), tokens()
    factor, linear = layer.dynamic['mlp'].scale['fc1'].factor, layer.dynamic['mlp'].beside['fc1'].linear
    expected = F.linear(x, factor[:, None] * layer.fc1.weight, layer.fc1.bias) + linear(x)
    torch.testing.assert_close(layer.call('mlp.fc1', x), expected)


@pytest.mark.parametrize('dispatch', ['attn_mlp', 'layer'])
@pytest.mark.parametrize('on', ['all', 'linears', 'attn.qkv', ['attn.q', 'attn.qkv', 'mlp.norm']])
@torch.no_grad()
def test_a_merged_layer_does_the_same_without_the_parts(dispatch, on):
    layer = build(Scale, dispatch=dispatch, on=on)
    merged = copy.deepcopy(layer)
    assert merge(merged) == [] and not places(merged)
    assert merged.state_dict().keys() == PlainLayer(dispatch=dispatch).state_dict().keys()
    torch.testing.assert_close(merged(tokens()), layer(tokens()))
    assert not torch.allclose(merged(tokens()), build(dispatch=dispatch)(tokens()))


@torch.no_grad()
def test_what_has_no_merged_form_stays_with_all_that_acts_on_it():
    layer = build(Scale, on=['mlp.fc1', 'mlp.fc2'])
    Beside.add_to(layer, on='mlp.fc2')
    layer = layer.double()
    before = layer(tokens())
    assert merge(layer) == ['mlp.fc2']
    assert places(layer) == ['dynamic.mlp.scale.fc2', 'dynamic.mlp.beside.fc2']
    torch.testing.assert_close(layer(tokens()), before)


@pytest.mark.parametrize('read', [None, 1])
@pytest.mark.parametrize('on', ['linears', 'attn.qkv', ['attn.v', 'mlp.fc2']])
@torch.no_grad()
def test_its_cost_is_what_an_operator_counter_sees(on, read):
    layer = build(Beside, on=on)
    with record_dispatch(layer) as record:
        counted = count_macs(lambda: layer(tokens(), TokenState(prefix=1, read=read)))
    runs = {site: record.runs[f'dynamic.{site}'][0] for site in layer.branches()}
    assert layer.macs(runs) == counted > layer.dense_macs(9) * (read is None)


@pytest.mark.parametrize(
    ('kind', 'options', 'message'),
    [
        (
            Scale,
            dict(on='attn.kqv'),
            r"on must name some of \['attn.norm', .*'linears', 'all'\], got 'attn.kqv'\. Rows of",
        ),
        (Scale, dict(on='lins'), r"on must name some of .*, got 'lins'"),
        (Scale, dict(on='attn.qkv', rows='qx'), r"rows must be some of 'q', 'k', 'v', such as 'qv', got 'qx'"),
        (Scale, dict(on='attn.qkv', rows='qq'), r"rows must be some of 'q', 'k', 'v', such as 'qv', got 'qq'"),
        (Scale, dict(on='attn.qkv', rows=''), r"rows must be some of 'q', 'k', 'v', such as 'qv', got ''"),
        (Beside, dict(on='attn.norm'), r'on must name linear layers for Beside, got a LayerNorm'),
    ],
)
def test_mistakes_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=f'^{message}'):
        build(kind, **options)


def test_the_same_part_twice_is_refused():
    with pytest.raises(ValueError, match="parts must have words of their own at mlp.fc1, got two named 'scale'"):
        build(Scale, Scale, on='mlp.fc1')


def test_without_a_merged_form_merging_is_refused():
    with pytest.raises(ValueError, match='Beside must stay beside the network: it has no merged form'):
        Beside(3, 2).merged(torch.ones(3, 2), None)
    assert Scale.merges() and not Beside.merges()


def test_thirds_are_names_of_rows():
    assert thirds('qv') == ['attn.q', 'attn.v']
