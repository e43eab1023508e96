"""A branch with parts beside it: what it adds up, when it runs what, and what it says that it ran."""

import pytest
import torch
from doubles import MLP, Fixed, Gate, Update

from mmdyt.core.branch import BranchRun, DynamicBranch
from mmdyt.core.observe import complete_model, record_dispatch
from mmdyt.core.part import Delta, TokenOp
from mmdyt.core.tokens import TokenState


class Behind(Update):
    word = 'behind'
    place = 'serial'


class Step(TokenOp):
    word = 'step'


class Instead(Update):
    word = 'instead'
    place = 'inactive'


def some(batch, tokens):
    """Some patch tokens active, as many in each image as its index; CLS always."""
    mask = torch.zeros(batch, tokens, 1)
    for image in range(batch):
        mask[image, : 1 + image] = 1
    return mask


@pytest.mark.parametrize('executor', ['packed', 'masked'])
@pytest.mark.parametrize('read', [None, 1])
def test_each_place_adds_its_own_term(executor, read):
    """By the definition: parallel and branch read x, what inactive tokens get too, and serial reads their sum."""
    torch.manual_seed(0)
    mask, mlp, x = some(3, 7).double(), MLP(16).double(), torch.randn(3, 7, 16).double()
    branch = DynamicBranch(Update(16), Instead(16), Behind(16), Fixed(mask), inference=executor).double().eval()
    y = x + branch.update(x) + torch.where(mask > 0, mlp(x), branch.instead(x))
    with torch.no_grad():
        out = branch(x, mlp, TokenState(read=read))
    torch.testing.assert_close(out, (y + branch.behind(y))[:, :read])


def test_all_deltas_of_a_place_count():
    class Another(Update):
        word = 'another'

    branch, mlp, x = DynamicBranch(Update(16), Another(16)), MLP(16), torch.randn(2, 5, 16)
    torch.testing.assert_close(branch(x, mlp), x + branch.update(x) + branch.another(x) + mlp(x))
    assert branch.deltas() == branch.deltas('parallel') == [branch.update, branch.another]


def test_eval_is_packed_by_default_and_masked_by_name():
    def count(inference):
        seen = []
        with torch.no_grad():
            branch(inference)(torch.randn(2, 8, 16), lambda x, layout: seen.append(x.shape[1]) or x)
        return seen[0]

    def branch(inference):
        return DynamicBranch(Update(16), Fixed(some(1, 8).expand(2, 8, 1)), inference=inference).eval()

    assert count('packed') == 2
    assert count('masked') == 8


def run_of(branch: DynamicBranch, read=None) -> BranchRun:
    """What a branch says that it ran on 3 images of 7 tokens."""
    with record_dispatch(branch) as record:
        branch(torch.randn(3, 7, 16, requires_grad=True), MLP(16), TokenState(prefix=1, read=read))
    ((run,),) = record.runs.values()
    return run


@pytest.mark.parametrize(
    ('options', 'training', 'gradients', 'learnt', 'skips'),
    [
        (dict(), False, False, False, True),
        (dict(inference='masked'), False, False, False, False),
        (dict(), False, True, False, False),  # with gradients the masked executor runs
        (dict(training='masked'), True, True, False, False),
        (dict(training='masked_all_keys'), True, True, False, False),
        (dict(training='split'), True, True, False, True),
        (dict(training='split'), True, True, True, False),  # inactive tokens run without gradients
    ],
)
def test_what_runs_is_recorded_not_what_was_decided(options, training, gradients, learnt, skips):
    branch = DynamicBranch(Update(16), Fixed(some(3, 7).requires_grad_(learnt)), **options).train(training)
    with torch.set_grad_enabled(gradients):
        tokens, patches, queries, keys = run_of(branch)[:4]
    assert (tokens, patches) == (7, 6)
    expected = [1, 2, 3] if skips else [7, 7, 7]
    for ran in (queries, keys):
        assert torch.as_tensor(ran).expand(3).tolist() == expected


def test_with_unread_tokens_only_the_read_ones_are_queries():
    branch = DynamicBranch(Update(16), Fixed(some(3, 7))).eval()
    with torch.no_grad():
        tokens, patches, queries, keys = run_of(branch, read=1)[:4]
    assert (tokens, patches, queries) == (1, 6, 1) and keys.tolist() == [1, 2, 3]


def test_what_needs_no_dispatcher_asks_none():
    """Neither the complete model nor a branch without a dispatcher is billed for decisions."""
    branch = DynamicBranch(Update(16), Gate(16)).eval()
    with torch.no_grad(), complete_model(branch):
        assert run_of(branch) == BranchRun(7, 0, 7, 7, prefix=1)
    with torch.no_grad():
        assert run_of(DynamicBranch(Update(16))) == BranchRun(7, 0, 7, 7, prefix=1)


def test_prompts_are_neither_asked_about_nor_left_out():
    torch.manual_seed(0)
    branch, x, state = DynamicBranch(Gate(16)).eval(), torch.randn(2, 9, 16), TokenState(prefix=1, prompts=3)
    with torch.no_grad(), record_dispatch(branch) as record:
        branch(x, MLP(16), state)
        with complete_model(branch):
            branch(x, MLP(16), state)
    decided, complete = record.flat()
    assert decided.num_prefix_tokens == complete.num_prefix_tokens == 4
    assert decided.mask[:, :4].eq(1).all() and 0 < decided.patch_mask.mean() < 1
    assert record.runs[''][0].patches == 5


@pytest.mark.parametrize(
    ('parts', 'options', 'message'),
    [
        (
            (),
            dict(inference='sparse'),
            r"inference must be one of \['auto', 'packed', 'fixed', 'masked'\], got 'sparse'\.",
        ),
        (
            (),
            dict(training='x'),
            r"training must be one of \['masked', 'split', 'active_only', 'masked_all_keys'\], got 'x'\.",
        ),
        (
            (Update(16), Update(16)),
            dict(),
            r"parts must have words of their own within a branch, got two named 'update'\.",
        ),
        (
            (Gate(16), Gate(16)),
            dict(),
            r"parts must have words of their own within a branch, got two named 'dispatcher'\.",
        ),
        ((Step(),), dict(), r'parts of a branch must be deltas or a dispatcher, got a Step\.'),
    ],
)
def test_mistakes_are_refused(parts, options, message):
    with pytest.raises(ValueError, match=f'^{message}$'):
        DynamicBranch(*parts, **options)


def test_none_is_left_out():
    branch = DynamicBranch(None, Update(16), None)
    assert list(branch.children()) == [branch.update] and branch.dispatcher is None
    assert isinstance(branch.update, Delta)
