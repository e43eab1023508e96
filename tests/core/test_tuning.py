import pytest
import torch.nn as nn

from mmdyt.core.part import Delta, Dispatcher
from mmdyt.core.tuning import count_parameters, set_tuned


class Adapter(nn.Linear, Delta):
    word = 'adapter'


class Gate(nn.Linear, Dispatcher):
    """Declares its weight only."""

    def tuned_parameters(self):
        return [self.weight]


def make():
    return nn.ModuleDict(dict(base=nn.Linear(4, 4), adapter=Adapter(4, 2), dispatcher=Gate(4, 1)))


@pytest.mark.parametrize(
    ('tuned', 'expected'),
    [
        (('adapter', 'dispatcher'), {'adapter.weight', 'adapter.bias', 'dispatcher.weight', 'dispatcher.bias'}),
        ((), set()),
        ((r'bias$',), {'base.bias', 'adapter.bias', 'dispatcher.bias'}),
        (None, {'adapter.weight', 'adapter.bias', 'dispatcher.weight'}),
        (('parts',), {'adapter.weight', 'adapter.bias', 'dispatcher.weight'}),
        (('parts', r'base\.bias'), {'adapter.weight', 'adapter.bias', 'dispatcher.weight', 'base.bias'}),
    ],
)
def test_only_what_a_pattern_names_or_a_part_declares_is_tuned(tuned, expected):
    module = make()
    set_tuned(module, tuned)
    assert {name for name, p in module.named_parameters() if p.requires_grad} == expected


def test_all_tunes_everything_even_after_freezing():
    module = make()
    set_tuned(module, ())
    set_tuned(module, 'all')
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize('tuned', [None, ('parts',)])
def test_a_module_without_parts_is_frozen_by_default(tuned):
    module = nn.Linear(4, 4)
    set_tuned(module, tuned)
    assert not any(p.requires_grad for p in module.parameters())


def test_a_pattern_without_a_match_and_a_bare_string_are_refused():
    with pytest.raises(ValueError, match="tuned must hold patterns that match parameter names, got 'adaptor'"):
        set_tuned(make(), ('adaptor',))
    with pytest.raises(ValueError, match="tuned must be 'all' or a list of patterns, got 'adapter'"):
        set_tuned(make(), 'adapter')


def test_counts_by_kind():
    module = make()
    set_tuned(module, ('adapter',))
    assert count_parameters(module) == dict(tuned=10, frozen=25, adapter=10, dispatcher=5)


def test_other_parts_are_counted_by_their_word():
    class Prompt(nn.Linear, Delta):
        word = 'prompt'

    assert count_parameters(Prompt(4, 2)) == dict(tuned=10, frozen=0, adapter=0, dispatcher=0, prompt=10)
