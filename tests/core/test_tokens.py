"""A sequence is [prefix, prompts, patches], whatever parts insert; hosts see it without the prompts."""

import pytest
import torch

from mmdyt.core.tokens import TokenState


@pytest.mark.parametrize('prefix', [0, 1, 5])
def test_prompts_are_behind_the_prefix_and_later_ones_take_their_place(prefix):
    x, state = torch.randn(2, 9, 4), TokenState(prefix=prefix)
    first, second = torch.randn(3, 4), torch.randn(2, 4)
    longer = state.insert(x, first)
    assert state.prompts == 3
    assert torch.equal(longer, torch.cat([x[:, :prefix], first.expand(2, -1, -1), x[:, prefix:]], dim=1))
    again = state.insert(longer, second)
    assert state.prompts == 2
    assert torch.equal(again, torch.cat([x[:, :prefix], second.expand(2, -1, -1), x[:, prefix:]], dim=1))


def test_restore_gives_the_sequence_of_the_host():
    x, state = torch.randn(2, 9, 4), TokenState(prefix=1)
    assert state.restore(x) is x
    assert torch.equal(state.restore(state.insert(x, torch.randn(3, 4))), x)


def test_all_read_changes_the_copy_only():
    state = TokenState(prefix=1, prompts=2, frames=4, read=1)
    other = state.all_read()
    assert (other.prefix, other.prompts, other.frames, other.read) == (1, 2, 4, None) and state.read == 1


def test_what_a_state_does_not_know_is_refused():
    with pytest.raises(TypeError, match='frame must be one of'):
        TokenState(1, frame=2)
