"""What dispatchers decide is seen and changed from outside, and afterwards all is as before."""

import copy

import pytest
import torch
import torch.nn as nn
from doubles import MLP, Gate, Update

from mmdyt.core.branch import DynamicBranch
from mmdyt.core.context import RECORDS, RULES, asked_of
from mmdyt.core.dispatch import Dispatch
from mmdyt.core.observe import (
    all_branches,
    complete_model,
    decisions,
    dynamic_branches,
    eval_mode,
    random_masks,
    record_dispatch,
    sampled,
    unrecorded,
    watch_updates,
)


def make_branch() -> DynamicBranch:
    return DynamicBranch(Update(16), Gate(16))


def make_model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(dict(a=make_branch(), plain=DynamicBranch(Update(16)), b=make_branch())).eval()


def run(model: nn.ModuleDict, x: torch.Tensor, mlp: MLP) -> None:
    for branch in model.values():
        x = branch(x, mlp)


def tokens() -> torch.Tensor:
    return torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))


def first(count: int):
    """A rule: the first ``count`` patch tokens are active."""

    def rule(dispatcher, x, state):
        mask = torch.zeros(*x.shape[:2], 1)
        mask[:, : 1 + count] = 1
        return Dispatch(mask, None, 1)

    return rule


def active(model: nn.Module) -> list[float]:
    """Active patch tokens of an image, by dispatched branch."""
    with torch.no_grad(), record_dispatch(model) as record:
        run(model, tokens(), MLP(16))
    return [dispatch.patch_mask[0].sum().item() for dispatch in record.flat()]


def test_complete_model_runs_every_token_nests_and_restores():
    model = nn.ModuleDict(dict(a=make_branch(), b=make_branch())).eval()
    x, mlp = torch.randn(2, 5, 16), MLP(16)
    expected = x + mlp(x) + model['a'].update(x)
    with complete_model(model):
        with complete_model(model['a']):
            torch.testing.assert_close(model['a'](x, mlp), expected)
        assert all(branch.complete for branch in model.values())
    assert not any(branch.complete for branch in model.values())
    with pytest.raises(ZeroDivisionError), complete_model(model):
        raise ZeroDivisionError
    assert not any(branch.complete for branch in model.values())


def test_a_rule_decides_for_all_branches_or_for_those_it_is_given_for():
    model = make_model()
    before = active(model)
    with decisions(model, first(3)):
        assert active(model) == [3, 3]
    with decisions(model, dict(b=first(2))):
        assert active(model) == [before[0], 2]
    assert active(model) == before


def test_the_innermost_rule_holds_and_the_former_ones_come_back():
    model = make_model()
    before = active(model)
    with decisions(model, first(3)):
        with decisions(model, dict(a=first(1))):
            assert active(model) == [1, 3]
            with complete_model(model):
                assert active(model) == [8, 8]
            assert active(model) == [1, 3]
        assert active(model) == [3, 3]
    assert active(model) == before


def test_rules_are_dropped_after_an_error():
    model = make_model()
    before = active(model)
    with decisions(model, first(3)):
        with pytest.raises(ZeroDivisionError), decisions(model, dict(a=first(1))):
            raise ZeroDivisionError
        assert active(model) == [3, 3]
    assert active(model) == before and not any(asked_of(RULES, branch) for branch in model.values())


@pytest.mark.parametrize('name', ['c', 'plain'])
def test_a_rule_for_no_dispatched_branch_is_refused_and_changes_nothing(name):
    model = make_model()
    with pytest.raises(KeyError, match=name), decisions(model, {'a': first(1), name: first(1)}):
        pytest.fail('entered')
    assert not any(asked_of(RULES, branch) for branch in model.values())


def test_a_rule_may_ask_the_dispatcher():
    model, masks = make_model(), []

    def invert(dispatcher, x, state):
        dispatch = dispatcher(x, state)
        masks.append(dispatch.mask)
        flipped = 1 - dispatch.mask
        flipped[:, : dispatch.num_prefix_tokens] = 1
        return dispatch.with_mask(flipped)

    with torch.no_grad(), decisions(model, invert), record_dispatch(model) as record:
        run(model, tokens(), MLP(16))
    for mask, dispatch in zip(masks, record.flat(), strict=True):
        assert torch.equal(dispatch.patch_mask, 1 - mask[:, 1:]) and dispatch.logits is not None


def test_sampled_decides_as_training_does_whatever_the_mode():
    model, mlp = make_model(), MLP(16)
    nn.init.zeros_(model['a'].dispatcher.linear.weight)  # scores of 0: active by chance only
    torch.manual_seed(3)
    expected = model['a'].train().dispatcher(tokens()).mask
    model.eval()
    torch.manual_seed(3)
    with decisions(model, sampled), record_dispatch(model) as record:
        run(model, tokens(), mlp)
    assert torch.equal(record.dispatches['a'][0].mask, expected)
    assert 0 < expected[:, 1:].mean() < 1 and not model['a'].dispatcher(tokens()).patch_mask.any()


def test_random_masks_keep_prefix_and_rate_and_decide_anew_each_time():
    model, x = make_model(), torch.randn(40, 101, 16)
    with torch.no_grad(), random_masks(model, dict(a=0.3)), record_dispatch(model) as record:
        torch.manual_seed(0)
        for _ in range(2):
            run(model, x, MLP(16))
    one, two = record.dispatches['a']
    assert one.mask[:, 0].eq(1).all() and not torch.equal(one.mask, two.mask)
    assert one.patch_mask.mean().item() == pytest.approx(0.3, abs=4 * (0.21 / 4000) ** 0.5)  # 4 sigma
    assert torch.equal(record.dispatches['b'][0].patch_mask, (record.dispatches['b'][0].logits > 0).float())


def test_record_dispatch_lists_branches_in_network_order_and_passes_in_time_order():
    model = nn.Sequential(make_branch(), make_branch()).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad(), record_dispatch(model) as record:
        for _ in range(2):
            model[1](model[0](x, MLP(16)), MLP(16))
        with record_dispatch(model[0]) as inner, complete_model(model):
            model[0](x, MLP(16))
    model[0](x, MLP(16))  # after the context: not recorded
    assert record.names == ['0', '1'] == list(dynamic_branches(model))
    assert [len(passes) for passes in record.dispatches.values()] == [3, 2]
    (complete,) = inner.flat()
    assert complete.mask.shape == (2, 5, 1) and complete.mask.eq(1).all() and complete.logits is None
    record.clear()
    assert record.flat() == [] and not any(record.runs.values())


def test_branches_without_a_dispatcher_decide_nothing_but_what_they_run_is_recorded():
    model = make_model()
    with torch.no_grad(), record_dispatch(model) as record:
        run(model, tokens(), MLP(16))
    assert record.names == list(record.dispatches) == list(dynamic_branches(model)) == ['a', 'b']
    assert list(record.runs) == list(all_branches(model)) == ['a', 'plain', 'b']
    assert all(len(passes) == 1 for passes in record.runs.values())


def test_recorded_training_masks_keep_their_gradient():
    model = make_model().train()
    with record_dispatch(model) as record:
        run(model, tokens(), MLP(16))
    record.dispatches['a'][0].mask.sum().backward()
    assert model['a'].dispatcher.linear.weight.grad.abs().sum() > 0


def test_a_copy_made_while_recording_writes_into_no_record():
    model, x = nn.Sequential(make_branch()).eval(), torch.randn(2, 5, 16)
    with torch.no_grad(), record_dispatch(model) as record:
        copy.deepcopy(model)[0](x, MLP(16))
        assert record.flat() == []
        model[0](x, MLP(16))
    assert len(record.flat()) == 1


def test_a_copy_made_under_a_rule_decides_on_its_own():
    model = make_model()
    before = active(model)
    with decisions(model, first(1)):
        assert active(copy.deepcopy(model)) == before != active(model)


def test_records_are_closed_after_an_error():
    model = nn.Sequential(make_branch())
    with pytest.raises(ZeroDivisionError), record_dispatch(model):
        raise ZeroDivisionError
    assert asked_of(RECORDS, model[0]) == []


def test_watchers_see_updates_of_the_complete_model_and_nothing_afterwards_even_after_an_error():
    model, seen, mlp = make_model(), [], MLP(16)
    with torch.no_grad(), watch_updates(model, lambda name, update: seen.append((name, update))):
        run(model, tokens(), mlp)
        assert not seen  # dispatched: there is no update of every token
        with complete_model(model):
            run(model, tokens(), mlp)
    assert [name for name, _ in seen] == ['a', 'b']
    torch.testing.assert_close(seen[0][1], mlp(tokens()))
    with pytest.raises(RuntimeError), complete_model(model), watch_updates(model, lambda *args: seen.append(args)):
        raise RuntimeError
    with complete_model(model):
        run(model, tokens(), mlp)
    assert len(seen) == 2


def test_eval_mode_gives_each_module_its_former_mode_back():
    model = make_model().train()
    model['b'].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(ZeroDivisionError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == before


def test_unrecorded_passes_are_seen_by_nobody_outside():
    model = make_model()
    with record_dispatch(model) as record, torch.no_grad():
        with unrecorded(), record_dispatch(model) as inner:
            run(model, tokens(), MLP(16))
        assert record.flat() == [] and len(inner.flat()) == 2
        run(model, tokens(), MLP(16))
    assert len(record.flat()) == 2
