"""Which tensors hold what is no number."""

import pytest
import torch
import torch.nn as nn

from mmdyt.core.finite import named_tensors, not_finite, open_buffers

NAN, INF = float('nan'), float('inf')


class Model(nn.Sequential):
    """A parameter, a batch norm, and a buffer that may be a mask."""

    def __init__(self):
        super().__init__(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.register_buffer('mask', torch.zeros(2))
        self[0].register_buffer('threshold', torch.zeros(()))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ('name', 'value', 'found'),
    [
        ('0.weight', NAN, True),
        ('0.weight', INF, True),
        ('0.weight', -INF, True),
        ('1.running_mean', -INF, True),
        ('1.running_var', INF, True),
        ('mask', NAN, True),
        ('mask', INF, True),
        ('mask', -INF, False),
        ('0.threshold', -INF, False),
        ('0.threshold', NAN, True),
        ('0.bias', 6e4, False),
    ],
)
def test_nan_is_found_everywhere_and_minus_infinity_outside_of_masks(name, value, found, dtype):
    model = Model().to(dtype)
    tensors = model.state_dict()
    tensors[name].view(-1)[-1] = value
    assert not_finite(tensors.items(), open_buffers(model)) == [name] * found


@pytest.mark.parametrize(
    'tensor',
    [torch.tensor([1, 2]), torch.tensor([True]), torch.empty(3, device='meta'), torch.empty(0), 'no tensor'],
    ids=['integers', 'booleans', 'meta', 'empty', 'extra state'],
)
def test_what_has_no_infinity_is_finite(tensor):
    assert not not_finite([('a', tensor)])


def test_nested_tensors_are_named_by_their_place():
    a, b, c = torch.zeros(3, 1)
    nested = dict(state={0: dict(step=a, exp_avg=b)}, groups=[dict(lr=0.1), (c, None)])
    found = dict(named_tensors(nested, 'optimizer'))
    assert list(found) == ['optimizer.state.0.step', 'optimizer.state.0.exp_avg', 'optimizer.groups.1.0']
    assert not dict(named_tensors(None))
