import pytest
import torch
import torch.nn as nn
from doubles import PlainLayer

from mmdyt.core.tuning import merge, set_tuned
from mmdyt.parts.bridge import bridge_state, compensators, set_degree
from mmdyt.parts.token_compensator import TokenCompensator
from mmdyt.parts.tome import ToMe

DEGREES = [(0, 16), (16, 0), (3, 5), (5, 3), (0, 1), (15, 16)]


def make(**options):
    torch.manual_seed(0)
    part = TokenCompensator(6, 4, **(dict(dropout=0.0, scale=0.5) | options)).double()
    nn.init.normal_(part.up)
    return part, torch.randn(6, 4).double(), torch.randn(6).double(), torch.randn(3, 5, 4).double()


def update(part, tuned_at, run_at):
    part.set_degrees(tuned_at, run_at)
    return part.update()


def bridged(r=2, **options) -> PlainLayer:
    torch.manual_seed(0)
    layer = PlainLayer()
    ToMe.add_to(layer, r=r)
    TokenCompensator.add_to(layer, **options)
    return layer.double().eval()


@pytest.fixture
def file(tmp_path):
    """A bridge whose every group does something."""
    layer = bridged()
    for part in compensators(layer):
        nn.init.normal_(part.up)
    torch.save(bridge_state(layer), tmp_path / 'bridge.pth')
    return str(tmp_path / 'bridge.pth')


@pytest.mark.parametrize(('tuned_at', 'run_at'), DEGREES)
@pytest.mark.parametrize('rank', [1, 3])
def test_it_computes_the_equation_and_merges(tuned_at, run_at, rank):
    part, weight, bias, x = make(tuned_at=tuned_at, run_at=run_at, rank=rank)
    expected = weight.clone()
    for i in range(min(tuned_at, run_at) + 1, max(tuned_at, run_at) + 1):
        group = slice((i - 1) * rank, i * rank)
        expected += 0.5 * (1 if run_at > tuned_at else -1) * part.up[:, group] @ part.down[group]
    torch.testing.assert_close(part(x, weight, bias), x @ expected.T + bias)
    merged, same = part.merged(weight, bias)
    torch.testing.assert_close(merged, expected)
    assert same is bias and part.macs_per_token() == abs(run_at - tuned_at) * rank * 10


@pytest.mark.parametrize('degree', [0, 8, 16])
def test_equal_degrees_add_exactly_nothing(degree):
    part, weight, bias, x = make(tuned_at=degree, run_at=degree)
    assert torch.equal(part(x, weight, bias), nn.functional.linear(x, weight, bias))
    assert torch.equal(part.merged(weight, bias)[0], weight) and part.macs_per_token() == 0


def test_the_way_back_is_minus_the_way_there_and_ways_add_up():
    part, *_ = make()
    for a, b, c in [(0, 5, 16), (9, 2, 4), (4, 16, 1)]:
        assert torch.equal(update(part, a, b), -update(part, b, a)) and update(part, a, b).abs().max() > 0
        torch.testing.assert_close(update(part, a, c), update(part, a, b) + update(part, b, c))


def test_a_fresh_one_adds_nothing_and_only_groups_between_the_degrees_learn():
    part, x = TokenCompensator(6, 4, tuned_at=3, run_at=5), torch.randn(3, 5, 4)
    weight, bias = torch.randn(6, 4), torch.randn(6)
    out = part(x, weight, bias)
    assert torch.equal(out, nn.functional.linear(x, weight, bias)) and part.down.abs().max() <= 4**-0.5
    out.square().sum().backward()
    assert part.up.grad.abs().sum(0).nonzero().flatten().tolist() == [6, 7, 8, 9]


def test_it_belongs_to_queries_and_values_and_no_task_tunes_it():
    layer = bridged()
    set_tuned(layer)
    assert [part.place for part in compensators(layer)] == ['layers.0.attn.q', 'layers.0.attn.v']
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@torch.no_grad()
def test_one_call_sets_merging_and_bridge_and_a_merged_layer_does_the_same(file):
    layer, x = bridged(tuned_at=0, checkpoint=file), torch.randn(2, 9, 16).double()
    outs = {}
    for degree in (2, 1, 3):
        set_degree(layer, degree)
        outs[degree] = layer(x)
        assert outs[degree].shape[1] == 9 - degree
        assert {(part.tuned_at, part.run_at) for part in compensators(layer)} == {(0, degree)}
    set_degree(layer, 3, tuned_at=3)
    assert not torch.allclose(layer(x), outs[3], atol=1e-3)
    set_degree(layer, 3, tuned_at=0)
    keys = layer.qkv.weight[16:32].clone()
    assert merge(layer) == [] and compensators(layer) == []
    torch.testing.assert_close(layer(x), outs[3], rtol=0, atol=1e-9)
    assert torch.equal(layer.qkv.weight[16:32], keys)


def test_a_file_gives_the_bridge_and_checkpoints_leave_it_alone(file):
    layer, plain = bridged(tuned_at=0, checkpoint=file), PlainLayer()
    saved = torch.load(file)
    assert saved['bridge'] == dict(rank=2, scale=0.1, widths=[(16, 16)])
    assert layer.state_dict().keys() == plain.state_dict().keys()
    layer.load_state_dict(plain.state_dict())  # strictly
    for part in compensators(layer):
        part.reset_parameters()  # as init_weights does
        assert torch.equal(part.up, saved['state_dict'][f'{part.place}.up'].double())
    trained = bridged()
    assert 'dynamic.attn.compensator.q.up' in trained.state_dict()
    with pytest.raises(RuntimeError, match='Missing key'):
        trained.load_state_dict(plain.state_dict())
    layer.load_state_dict(trained.state_dict())  # a bridge in a checkpoint gives way to that of the file
    assert bridge_state(layer)['state_dict'].keys() == saved['state_dict'].keys()
    assert all(part.up.abs().sum() > 0 for part in compensators(layer))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(rank=0), 'rank must be a positive integer, got 0'),
        (dict(scale=float('inf')), 'scale must be a finite number, got inf'),
        (dict(dropout=1), r'dropout must lie in \[0, 1\), got 1'),
        (dict(run_at=17), 'run_at must be a number of pairs from 0 to 16 with a bridge, got 17'),
        (dict(tuned_at=-1), 'tuned_at must be a number of pairs from 0 to 16 with a bridge, got -1'),
        (dict(tuned_at=True), 'tuned_at must be a number of pairs from 0 to 16 with a bridge, got True'),
        (dict(checkpoint=3), 'checkpoint must name a file or be None, got 3'),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=f'^{message}'):
        TokenCompensator(4, 4, **options)


@pytest.mark.parametrize(
    ('merging', 'options', 'message'),
    [
        (
            None,
            {},
            "parts must hold a ToMe with schedule='constant', scope='block' before a TokenCompensator, got none",
        ),
        (dict(scope='mlp'), {}, "parts must hold a ToMe with schedule='constant', scope='block' before .*, got none"),
        (dict(schedule='falling'), {}, "parts must hold a ToMe with schedule='constant', .*, got another"),
        (dict(r=17), {}, 'r must be a number of pairs from 0 to 16 with a bridge, got 17'),
        (dict(r=2), dict(tuned_at=0), 'checkpoint must name a trained bridge from tuned_at=0 to r=2, got None'),
    ],
)
def test_what_cannot_be_bridged_is_refused(merging, options, message):
    layer = PlainLayer()
    if merging is not None:
        ToMe.add_to(layer, **merging)
    with pytest.raises(ValueError, match=f'^{message}'):
        TokenCompensator.add_to(layer, **options)


def test_files_that_hold_no_bridge_of_the_network_are_refused(tmp_path, file):
    message = r'checkpoint must hold a bridge .*, layers.0.attn.q.down of shape \(48, 16\), got \(32, 16\)'
    with pytest.raises(ValueError, match=message):
        bridged(checkpoint=file, rank=3)
    with pytest.raises(FileNotFoundError, match='checkpoint must name an existing file, got none.pth'):
        bridged(checkpoint='none.pth')
    (tmp_path / 'broken.pth').write_text('no tensors')
    with pytest.raises(ValueError, match='checkpoint must be a file that tools/train_compensator.py wrote, .* broken'):
        bridged(checkpoint=str(tmp_path / 'broken.pth'))
    torch.save(PlainLayer().state_dict(), tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='checkpoint must be a file that tools/train_compensator.py wrote, got'):
        bridged(checkpoint=str(tmp_path / 'other.pth'))
    content = torch.load(file)
    content['state_dict']['layers.0.attn.v.up'][0, 0] = torch.nan
    torch.save(content, tmp_path / 'nan.pth')
    with pytest.raises(ValueError, match='layers.0.attn.v.up of shape .*, or not finite'):
        bridged(checkpoint=str(tmp_path / 'nan.pth'))


@pytest.mark.parametrize(
    ('merging', 'bridge', 'arguments', 'message'),
    [
        (None, False, (8,), 'model must have mmdyt.ToMe parts for a degree to be set, got none'),
        (dict(schedule='falling'), False, (8,), "schedule must be 'constant', scope 'block' for a degree to be set"),
        (dict(scope='mlp'), False, (8,), "schedule must be 'constant', scope 'block' for a degree to be set"),
        ({}, False, (-1,), 'degree must be a number of pairs, got -1'),
        ({}, False, (8, 0), 'tuned_at must be None without a mmdyt.TokenCompensator, got 0'),
        ({}, True, (17,), 'degree must be a number of pairs from 0 to 16 with a bridge, got 17'),
        ({}, True, (8, 1.5), 'tuned_at must be a number of pairs from 0 to 16 with a bridge, got 1.5'),
    ],
)
def test_degrees_that_make_no_sense_are_refused_and_change_nothing(merging, bridge, arguments, message):
    layer = PlainLayer()
    if merging is not None:
        ToMe.add_to(layer, **merging)
    if bridge:
        TokenCompensator.add_to(layer)
    before = repr(layer)
    with pytest.raises(ValueError, match=f'^{message}'):
        set_degree(layer, *arguments)
    assert repr(layer) == before
