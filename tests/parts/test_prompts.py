import pytest
import torch
import torch.nn as nn
from doubles import Gate, PlainLayer

from mmdyt.core.observe import record_dispatch
from mmdyt.core.tokens import TokenState
from mmdyt.parts.prompts import Prompts

DIM, PATCH = 16, 3 * 4 * 4


def network(length, deep, depth=3):
    torch.manual_seed(0)
    layers = [PlainLayer(DIM) for _ in range(depth)]
    for i, layer in enumerate(layers):
        layer.place = layer.place._replace(index=i, depth=depth)
        Prompts.add_to(layer, deep=deep, length=length, dropout=0.0)
        layer.eval()
    return layers


def run(layers, x):
    state = TokenState(prefix=1)
    for layer in layers:
        x = layer(x, state)
    return state.restore(x)


@torch.no_grad()
def test_no_prompts_is_the_plain_network():
    x = torch.randn(2, 7, DIM)
    plain = [PlainLayer(DIM).eval() for _ in range(3)]
    for deep in (False, True):
        layers = network(0, deep)
        for layer, other in zip(layers, plain, strict=True):
            other.load_state_dict(layer.state_dict(), strict=False)
        torch.testing.assert_close(run(layers, x), run(plain, x))


@torch.no_grad()
@pytest.mark.parametrize('deep', [False, True])
def test_prompts_lie_behind_the_prefix_change_the_result_and_are_stripped(deep):
    x = torch.randn(2, 7, DIM)
    (found,) = {run(network(length, deep), x).shape for length in (1, 3, 10)}
    assert found == x.shape
    state = TokenState(prefix=1)
    part = Prompts(DIM, PATCH, length=3, dropout=0.0)
    seen = part(x, state)
    assert torch.equal(seen[:, 1:4], part.tokens.expand(2, -1, -1))
    assert torch.equal(seen[:, :1], x[:, :1]) and torch.equal(seen[:, 4:], x[:, 1:])
    assert state.prompts == 3 and torch.equal(state.restore(seen), x)
    assert (run(network(3, deep), x) - run(network(0, deep), x)).abs().max() > 1e-3


@torch.no_grad()
def test_shallow_ones_are_in_one_block_deep_ones_in_all():
    assert [len(layer.steps('enter')) for layer in network(2, deep=False)] == [1, 0, 0]
    assert [len(layer.steps('enter')) for layer in network(2, deep=True)] == [1, 1, 1]


@torch.no_grad()
def test_deep_prompts_forget_what_the_block_before_left_in_their_slots():
    x, part, state = torch.randn(2, 9, DIM), Prompts(DIM, PATCH, length=2, dropout=0.0), TokenState(1, prompts=2)
    other = x.clone()
    other[:, 1:3] = 100.0
    assert torch.equal(part(x, state), part(other, state))
    assert part(x, state).shape == x.shape


def test_start_values_are_uniform_within_the_bound_of_the_paper():
    tokens = Prompts(768, 3 * 16 * 16, length=200).tokens
    assert tokens.abs().max() <= 0.0625 and tokens.std().item() == pytest.approx(0.0625 / 3**0.5, rel=0.02)


@torch.no_grad()
def test_prompts_are_never_dispatched_or_counted():
    (layer,) = network(4, deep=True, depth=1)
    Gate(DIM).attach(layer, 'mlp')
    with record_dispatch(layer.eval()) as record:
        layer(torch.randn(2, 7, DIM), TokenState(prefix=1))
    (dispatch,) = record.flat()
    assert dispatch.num_prefix_tokens == 5 and dispatch.mask[:, :5].eq(1).all()
    assert dispatch.patch_mask.shape == dispatch.logits.shape == (2, 6, 1)


def test_dropout_falls_on_the_prompts_only_image_by_image():
    torch.manual_seed(0)
    part, x = Prompts(DIM, PATCH, length=50, dropout=0.5).train(), torch.ones(2, 3, DIM)
    nn.init.ones_(part.tokens)
    out = part(x, TokenState(prefix=1))
    assert set(out[:, 1:51].unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(out[0], out[1])
    assert out[:, :1].eq(1).all() and out[:, 51:].eq(1).all()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(length=-1), 'length must be a number of prompts, got -1'),
        (dict(length=2.0), 'length must be a number of prompts, got 2.0'),
        (dict(dropout=1.0), r'dropout must lie in \[0, 1\), got 1.0'),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Prompts(DIM, PATCH, **options)
