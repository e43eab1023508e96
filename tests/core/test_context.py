"""What is asked of a model from outside is local to a thread, and to a copy of its context."""

import copy
import pickle
import threading
from contextlib import contextmanager
from contextvars import copy_context

import pytest
import torch
import torch.nn as nn
from doubles import MLP, Gate, Update

from mmdyt.core.branch import DynamicBranch
from mmdyt.core.context import RECORDS, RULES, WATCHERS, asked_of
from mmdyt.core.dispatch import Dispatch
from mmdyt.core.observe import complete_model, decisions, random_masks, record_dispatch, watch_updates

torch.manual_seed(3)
BRANCH = MLP(16)
TOKENS = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))


def three(dispatcher, x, state):
    """A rule: the first three patch tokens are active."""
    mask = torch.zeros(*x.shape[:2], 1)
    mask[:, :4] = 1
    return Dispatch(mask, None, 1)


@contextmanager
def recorded(model):
    """As record_dispatch; gives how many decisions were recorded."""
    with record_dispatch(model) as record:
        yield lambda: len(record.flat())


@contextmanager
def watched(model):
    """As watch_updates; gives how many updates were seen."""
    seen = []
    with watch_updates(model, lambda *args: seen.append(args)):
        yield lambda: len(seen)


RULED = dict(
    complete_model=(complete_model, 8),
    decisions=(lambda model: decisions(model, three), 3),
    decisions_by_name=(lambda model: decisions(model, dict(b=three)), 3),
    random_masks=(lambda model: random_masks(model, dict(a=0.0, b=0.0)), 0),
)
LISTENING = dict(record_dispatch=recorded, watch_updates=watched)
OPENED = {name: entry[0] for name, entry in RULED.items()} | LISTENING


def make_model() -> nn.ModuleDict:
    torch.manual_seed(2)
    return nn.ModuleDict({name: DynamicBranch(Update(16), Gate(16)) for name in 'ab'}).eval()


@torch.no_grad()
def run(model) -> int:
    """Active patch tokens of the first image in the last branch."""
    with record_dispatch(model) as record:
        model['b'](model['a'](TOKENS, BRANCH), BRANCH)
    return int(record.dispatches['b'][0].patch_mask[0].sum())


def run_complete(model) -> int:
    with complete_model(model):
        return run(model)


def in_thread(function, *args):
    """What a function gives in a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*args)))
    thread.start()
    thread.join()
    return found[0]


def nothing_is_asked(model) -> bool:
    return not any(asked_of(what, branch) for what in (RULES, RECORDS, WATCHERS) for branch in model.values())


@pytest.mark.parametrize('name', RULED)
def test_another_thread_sees_no_rule_and_one_with_a_copy_of_the_context_does(name):
    (opened, active), model = RULED[name], make_model()
    before = run(model)
    assert before not in (0, 3, 8)
    with opened(model):
        assert run(model) == active
        assert in_thread(run, model) == before
        assert in_thread(copy_context().run, run, model) == active
        assert in_thread(run_complete, model) == 8
        assert run(model) == active
    assert run(model) == in_thread(run, model) == before


@pytest.mark.parametrize('name', LISTENING)
def test_nobody_hears_of_another_thread_but_of_one_with_a_copy_of_the_context(name):
    model = make_model()
    with LISTENING[name](model) as heard:
        in_thread(run_complete, model)
        assert heard() == 0
        in_thread(copy_context().run, run_complete, model)
        assert heard() == 2
        run_complete(model)
        assert heard() == 4


def test_a_record_knows_whether_it_is_open_here():
    model = make_model()
    with record_dispatch(model) as record:
        assert record.here and in_thread(copy_context().run, lambda: record.here) and not in_thread(lambda: record.here)
    assert not record.here


def test_threads_with_contexts_of_their_own_do_not_disturb_each_other():
    """Each leaves while others are within, in every order."""
    model, barrier, wrong = make_model(), threading.Barrier(len(RULED)), []

    def work(opened, active):
        for i in range(20):
            barrier.wait()
            with opened(model), recorded(model) as heard, watched(model) as seen:
                got = [run(model) for _ in range(1 + i % 3)]
                updates = 2 * len(got) if opened is complete_model else 0
                if set(got) != {active} or heard() != 2 * len(got) or seen() != updates:
                    wrong.append((active, got, heard(), seen()))
            if not nothing_is_asked(model):
                wrong.append('left behind')

    threads = [threading.Thread(target=work, args=entry) for entry in RULED.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize('name', OPENED)
def test_generators_leave_in_any_order(name):
    model = make_model()

    def generate(opened):
        with opened(model):
            yield run(model)

    before = run(model)
    first, second = generate(OPENED[name]), generate(RULED['decisions'][0])
    next(first)
    assert next(second) == 3
    first.close()
    assert run(model) == 3
    third = generate(OPENED[name])
    next(third)
    second.close()
    assert run(model) == RULED[name][1] if name in RULED else before
    del third  # never finished
    assert nothing_is_asked(model) and run(model) == before


@pytest.mark.parametrize('name', OPENED)
@pytest.mark.parametrize('clone', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_within_a_context_is_not_in_it(name, clone):
    model = make_model()
    before = run(model)
    with OPENED[name](model):
        other = clone(model)
        assert nothing_is_asked(other) and run(other) == before
        with complete_model(other):
            assert run(other) == 8
    assert run(other) == before


@pytest.mark.parametrize('name', OPENED)
def test_nothing_stays_after_an_error(name):
    model = make_model()
    with pytest.raises(ZeroDivisionError), OPENED[name](model), OPENED[name](model):
        raise ZeroDivisionError
    assert nothing_is_asked(model)


@pytest.mark.parametrize('name', OPENED)
def test_replicas_of_data_parallel_would_not_see_it_and_are_refused(name):
    model = make_model()
    model['a']._replicate_for_data_parallel()
    with OPENED[name](model), pytest.raises(RuntimeError, match='must not be replicated within'):
        model['b']._replicate_for_data_parallel()


def test_a_compiled_model_obeys_each_context_and_is_compiled_once_for_each():
    branch = DynamicBranch(Gate(16), inference='masked').eval()
    compiled = torch.compile(lambda x: branch(x, BRANCH), backend='eager', fullgraph=True)
    graphs = torch._dynamo.utils.counters['stats']
    before = graphs['unique_graphs']
    with torch.no_grad():
        for _ in range(2):
            for opened in (record_dispatch, complete_model, RULED['decisions'][0]):
                with opened(branch), record_dispatch(branch) as record:
                    torch.testing.assert_close(compiled(TOKENS), branch(TOKENS, BRANCH))
                ours, theirs = record.flat()
                assert torch.equal(ours.mask, theirs.mask)
            torch.testing.assert_close(in_thread(compiled, TOKENS), branch(TOKENS, BRANCH))
    assert graphs['unique_graphs'] - before == 4
