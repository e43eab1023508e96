"""The order of things in a block, the rooms of its parts, and what it says that it costs."""

import pytest
import torch
import torch.nn as nn
from doubles import Fixed, Gate, PlainLayer, Update

from mmdyt.core.attention import DENSE
from mmdyt.core.block import DISPATCH
from mmdyt.core.macs import count_macs
from mmdyt.core.observe import complete_model, record_dispatch
from mmdyt.core.part import Dispatcher, Part, TokenOp, parts
from mmdyt.core.tokens import TokenState


class Log(TokenOp):
    """Notes when it ran, and on how many tokens; adds a prompt where it enters."""

    word = 'log'

    def __init__(self, dim: int, step: str, seen: list):
        super().__init__()
        self.step, self.seen = step, seen
        self.prompt = nn.Parameter(torch.randn(1, dim))

    def forward(self, x, state):
        self.seen.append((self.step, x.shape[1]))
        return state.insert(x, self.prompt) if self.step == 'enter' else x


def build(dispatch: str = 'mlp', **options) -> PlainLayer:
    """A layer with an update and a gate beside each dispatched branch."""
    torch.manual_seed(0)
    layer = PlainLayer(dispatch=dispatch, **options)
    for site in DISPATCH[dispatch]:
        Update.add_to(layer, site=site)
    Gate.add_to(layer)
    return layer.double().eval()


def tokens(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_without_parts_it_is_the_plain_layer():
    layer, x = PlainLayer().double().eval(), tokens()
    y = x + layer.attention_branch(x, DENSE)
    torch.testing.assert_close(layer(x), y + layer.mlp_branch(y, DENSE))


def test_steps_run_before_between_and_after_the_branches():
    layer, seen = build('attn_mlp'), []
    for step in ('leave', 'enter', 'mid'):
        Log(16, step, seen).double().attach(layer)
    for site in ('attn', 'mlp'):
        layer.dynamic[site].register_forward_hook(lambda m, args, out, site=site: seen.append((site, out.shape[1])))
    state = TokenState(prefix=1)
    out = layer(tokens(), state)
    assert seen == [('enter', 9), ('attn', 10), ('mid', 10), ('mlp', 10), ('leave', 10)]
    assert state.prompts == 1 and out.shape == (3, 10, 16)
    assert state.restore(out).shape == (3, 9, 16)


@pytest.mark.parametrize('dispatch', DISPATCH)
def test_packed_equals_masked(dispatch):
    packed, masked = build(dispatch), build(dispatch, inference='masked')
    with torch.no_grad(), record_dispatch(packed) as record:
        torch.testing.assert_close(packed(tokens()), masked(tokens()))
    assert all(0 < dispatch.patch_mask.mean() < 1 for dispatch in record.flat())


@pytest.mark.parametrize('dispatch', DISPATCH)
@pytest.mark.parametrize('inference', ['packed', 'masked'])
@pytest.mark.parametrize('read', [None, 1])
@torch.no_grad()
def test_its_cost_is_what_an_operator_counter_sees(dispatch, inference, read):
    layer = build(dispatch, inference=inference)
    with record_dispatch(layer) as record:
        counted = count_macs(lambda: layer(tokens(1), TokenState(prefix=1, read=read)))
    runs = {site: record.runs[f'dynamic.{site}'][0] for site in layer.branches()}
    assert layer.macs(runs) == counted
    with complete_model(layer), record_dispatch(layer) as record:
        counted = count_macs(lambda: layer(tokens(1), TokenState(prefix=1, read=read)))
    complete = {site: record.runs[f'dynamic.{site}'][0] for site in layer.branches()}
    assert layer.macs(complete) == counted


@torch.no_grad()
def test_images_are_billed_one_by_one():
    layer = build('layer')
    with record_dispatch(layer) as record:
        counted = count_macs(lambda: layer(tokens()))
    each = layer.macs(dict(layer=record.runs['dynamic.layer'][0]))
    assert each.shape == (3,) and len(set(each.tolist())) > 1 and each.sum().item() == counted


@torch.no_grad()
def test_the_plain_layer_costs_the_dense_macs():
    layer = PlainLayer()
    assert layer.dense_macs(9) == count_macs(lambda: layer(torch.randn(1, 9, 16)))
    assert build('attn_mlp').dense_macs(9) == layer.dense_macs(9)


def test_parts_are_children_of_their_site_under_their_word():
    layer = build('attn_mlp')
    assert [name for name, module in layer.named_modules() if isinstance(module, Part)] == [
        f'dynamic.{site}.{word}' for site in ('attn', 'mlp') for word in ('update', 'dispatcher')
    ]
    assert len(list(parts(layer))) == 4


@pytest.mark.parametrize(('dispatch', 'site'), [('mlp', 'mlp'), ('attn', 'mlp'), ('layer', 'layer')])
def test_a_delta_without_a_site_is_beside_the_mlp_or_the_layer(dispatch, site):
    layer = PlainLayer(dispatch=dispatch)
    Update.add_to(layer)
    assert [s for s, branch in layer.branches().items() if branch.deltas()] == [site]


def test_the_dispatcher_of_the_mlp_is_asked_about_every_token_in_training_only():
    """The rate loss counts what it would decide, though nobody reads the patches after it."""
    layer = build('mlp')
    for training, asked in ((True, 8), (False, 0)):
        with record_dispatch(layer) as record:
            out = layer.train(training)(tokens(), TokenState(prefix=1, read=1))
        assert record.flat()[0].patch_mask.shape == (3, asked, 1) and out.shape == (3, 1, 16)


def log(step: str) -> Log:
    return Log(16, step, [])


TWICE = 'parts must have words of their own'


@pytest.mark.parametrize(
    ('dispatch', 'add', 'message'),
    [
        ('mlp', lambda x: Update.add_to(x, site='layer'), r"site must be one of \['attn', 'mlp'\] with dispatch='mlp'"),
        ('layer', lambda x: Update.add_to(x, site='mlp'), r"site must be one of \['layer'\] with dispatch='layer'"),
        ('mlp', lambda x: Gate.add_to(x), f"{TWICE} within a branch, got two named 'dispatcher'"),
        ('mlp', lambda x: Update.add_to(x), f"{TWICE} within a branch, got two named 'update'"),
        ('mlp', lambda x: [log('mid').attach(x) for _ in 'ab'], f"{TWICE} at mid, got two named 'log'"),
        (
            'mlp',
            lambda x: log('amid').attach(x),
            r"step must be one of \['enter', 'mid', 'around', 'leave'\], got 'amid' of a Log",
        ),
        (
            'layer',
            lambda x: log('mid').attach(x),
            "dispatch must not be 'layer' with a Log, which acts within the layer",
        ),
    ],
)
def test_parts_without_a_room_are_refused(dispatch, add, message):
    with pytest.raises(ValueError, match=f'^{message}'):
        add(build(dispatch))


def test_a_part_must_know_its_room():
    class Other(Part):
        word = 'other'

    with pytest.raises(
        TypeError, match='Other must be a Delta, a Rewrite, a TokenOp or a Dispatcher, to know its room'
    ):
        Other.add_to(PlainLayer())


def test_a_dispatcher_of_the_test_can_be_attached_to_one_site():
    layer = PlainLayer(dispatch='attn_mlp')
    Fixed(torch.ones(1, 9, 1)).attach(layer, 'attn')
    assert isinstance(layer.dynamic['attn'].dispatcher, Dispatcher) and layer.dynamic['mlp'].dispatcher is None
