"""Plans that make tokens fewer, against loops over tokens, and what the state of the tokens makes of them."""

import pytest
import torch

from mmdyt.core.reduction import Keep, keep_best, match_pairs
from mmdyt.core.tokens import TokenState


def values(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize('fuse', ['sum', 'mean', 'none'])
@pytest.mark.parametrize('number', [1, 4, 8])
def test_the_best_stay_in_order_and_the_others_become_one(fuse, number):
    x, scores = values(3, 9, 5), values(3, 9, seed=1).sigmoid()
    plan = keep_best(scores, number, fuse)
    after = plan.apply(x)
    assert plan.number == after.shape[1] == number + (fuse != 'none') and plan.drops == (fuse == 'none')
    for image in range(3):
        best = sorted(range(9), key=lambda i: -scores[image, i])[:number]
        rest = [i for i in range(9) if i not in best]
        assert torch.equal(after[image, :number], x[image, sorted(best)])
        assert plan.stays[image].nonzero().flatten().tolist() == sorted(best)
        slots = {**{token: place for place, token in enumerate(sorted(best))}, **dict.fromkeys(rest, number)}
        assert plan.slots[image].tolist() == [slots[i] if i in best or fuse != 'none' else -1 for i in range(9)]
        if fuse != 'none':
            weights = scores[image, rest] / (scores[image, rest].sum() if fuse == 'mean' else 1)
            torch.testing.assert_close(after[image, number], (weights[:, None] * x[image, rest]).sum(0))


def test_scores_have_a_gradient_where_tokens_are_fused():
    scores = values(2, 6).sigmoid().requires_grad_()
    keep_best(scores, 3, 'sum').apply(values(2, 6, 4)).sum().backward()
    assert (scores.grad != 0).sum(1).tolist() == [3, 3]


def test_padding_neither_stays_nor_is_fused():
    x, scores, padding = values(2, 8, 4), values(2, 8, seed=1).sigmoid() + 1, torch.zeros(2, 8, dtype=torch.bool)
    padding[1, 3:] = True
    scores[1, 3:] = 9.0
    plan = keep_best(scores, 2, 'mean', padding)
    assert not (plan.stays & padding).any()
    left = (~plan.stays & ~padding)[1]
    torch.testing.assert_close(plan.apply(x)[1, 2], x[1, left][0])  # the only one that is left
    few = keep_best(scores, 5, 'sum', padding)
    assert few.stays[1].sum() == 5 and few.stays[1, :3].all()  # shapes are static: padding fills up


@pytest.mark.parametrize('first', [0, 1, 3])
@pytest.mark.parametrize('tokens', [2, 7, 12])
def test_pairs_merge_as_a_loop_merges_them(first, tokens):
    metric, x = values(2, tokens, 3), values(2, tokens, 4, seed=1)
    sizes = values(2, tokens, seed=2).abs() + 1
    for pairs in range(1, tokens // 2 + 1):
        plan = match_pairs(metric, pairs, sizes, first)
        after, total = plan.apply(x), plan.total(sizes)
        assert after.shape[1] == total.shape[1] == tokens - pairs
        for image in range(2):
            a = [i for i in range(tokens) if (first + i) % 2 == 0]
            b = [i for i in range(tokens) if (first + i) % 2]
            unit = metric[image] / metric[image].norm(dim=-1, keepdim=True)
            found = {i: max((float(unit[i] @ unit[j]), -j) for j in b) for i in a}
            merged = sorted(a, key=lambda i: -found[i][0])[:pairs]
            groups = {i: [i] for i in a if i not in merged} | {j: [j] for j in b}
            for i in merged:
                groups[-found[i][1]].append(i)
            for place, (_, group) in enumerate(groups.items()):
                mean = (sizes[image, group, None] * x[image, group]).sum(0) / sizes[image, group].sum()
                torch.testing.assert_close(after[image, place], mean)
                torch.testing.assert_close(total[image, place], sizes[image, group].sum())
                assert (plan.slots[image, group] == place).all()


def test_a_merge_leaves_the_weighted_sum_and_untouched_tokens_as_they_were():
    metric, x, sizes = values(2, 10, 3), values(2, 10, 4, seed=1).float(), torch.ones(2, 10)
    plan = match_pairs(metric, 3, sizes, 1)
    after, total = plan.apply(x), plan.total(sizes)
    torch.testing.assert_close((total[..., None] * after).sum(1), x.sum(1))
    for image in range(2):
        alone = (total[image] == 1).nonzero().flatten()
        for place in alone:
            (token,) = (plan.slots[image] == place).nonzero().flatten()
            assert torch.equal(after[image, place], x[image, token])


def test_pairs_of_equal_tokens_merge_without_a_change():
    x = values(2, 4, 3).repeat_interleave(2, dim=1)
    after = match_pairs(x, 4, torch.ones(2, 8, dtype=torch.float64), 1).apply(x)
    torch.testing.assert_close(after, x[:, ::2], rtol=0, atol=0)


def test_padding_merges_with_padding_first():
    metric, padding = values(1, 12, 3), torch.zeros(1, 12, dtype=torch.bool)
    padding[0, 6:] = True
    plan = match_pairs(metric, 3, torch.ones(1, 12), 1, padding)
    assert (plan.slots[0, :6].unique().numel(), plan.slots[0, 6:].unique().numel()) == (6, 3)


def chain(state, x, plans):
    """Apply plans one after the other to patches behind one prefix token."""
    for plan in plans:
        x = state.reduce(x, plan(x.shape[1] - state.first))
    return x


def keep(number, seed, fuse='sum'):
    return lambda tokens: keep_best(values(2, tokens, seed=seed).sigmoid(), number, fuse)


def test_owners_are_composed_over_steps():
    """Reference: the tokens that hold a patch, followed through two plans by hand."""
    state = TokenState(prefix=1, restoring='stale', grid=(3, 4))
    x = torch.cat([torch.zeros(2, 1, 1), torch.arange(12.0).expand(2, -1)[..., None]], dim=1).double()
    scores = [values(2, 12, seed=1).sigmoid(), values(2, 7, seed=2).sigmoid()]
    out = chain(state, x, [keep(6, 1), keep(3, 2)])
    for image in range(2):
        first = sorted(scores[0][image].topk(6).indices.tolist())
        second = sorted(scores[1][image].topk(3).indices.tolist())
        for patch in range(12):
            place = first.index(patch) if patch in first else 6
            owner = second.index(place) if place in second else 3
            assert state.owner[image, patch] == owner
            assert state.live[image, patch] == (patch in first and place in second)
            if state.live[image, patch]:
                assert out[image, 1 + owner] == patch


@pytest.mark.parametrize('restore', ['stale', 'stale+delta', 'fused', 'knn', 'merge'])
def test_cells_that_live_have_their_tokens_and_others_what_the_policy_says(restore):
    state = TokenState(prefix=1, restoring=restore, grid=(3, 4))
    x = values(2, 13, 5)
    after = chain(state, x, [keep(6, 1), keep(3, 2)])
    later = after + 1.0  # what blocks do to the tokens that are left
    whole = state.restore(later)
    assert whole.shape == x.shape and torch.equal(whole[:, 0], later[:, 0])
    tokens, cells, start = later[:, 1:], whole[:, 1:], x[:, 1:]
    places = torch.cartesian_prod(torch.arange(3.0), torch.arange(4.0)).double()
    scores = values(2, 12, seed=1).sigmoid()
    for image in range(2):
        live = state.live[image]
        owner = state.owner[image]
        assert torch.equal(cells[image, live], tokens[image, owner[live]])
        early = scores[image].argsort(descending=True)[6:]  # left in the first step
        for patch in (~live).nonzero().flatten().tolist():
            if restore in ('fused', 'merge'):
                expected = tokens[image, owner[patch]]
            elif restore == 'stale':
                expected = start[image, patch]
            elif restore == 'stale+delta' and patch not in early:
                expected = start[image, patch] + 1.0  # fused in the last step, and moved by 1 since
            elif restore == 'knn':
                far = (places[patch] - places).norm(dim=-1).masked_fill(~live, torch.inf)
                near = far.argsort()[:3]
                weights = 1 / far[near]
                expected = (weights / weights.sum()) @ cells[image, near]
                if len(far.unique()) < len(far) and far.sort().values[2] == far.sort().values[3]:
                    continue  # a tie: which of them is nearest is open
            else:
                continue
            torch.testing.assert_close(cells[image, patch], expected)


def test_what_is_carried_and_padding_become_fewer_alike():
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = True
    state = TokenState(prefix=1, padding=padding)
    x = values(2, 7, 3)
    state.carried['adapter'] = 2 * x
    plan = Keep(torch.tensor([[0, 4], [1, 2]]), torch.ones(2, 6).double(), 'mean', padding)
    after = state.reduce(x, plan)
    torch.testing.assert_close(state.carried['adapter'], 2 * after)
    assert state.padding.tolist() == [[False, True, False], [False, False, False]]


def test_attention_counts_by_size():
    state = TokenState(prefix=2)
    x = values(1, 8, 3)
    assert state.key_bias() is None
    sizes = state.count_sizes(x)
    state.reduce(x, match_pairs(x[:, 2:], 2, sizes, 2))
    bias = state.key_bias()
    assert bias.shape == (1, 1, 1, 6) and not bias[..., :2].any()
    assert bias.exp().sum().item() == pytest.approx(8)


def test_what_is_dropped_cannot_be_restored_from_its_owner():
    state = TokenState(prefix=1, restoring='fused')
    with pytest.raises(
        ValueError, match="restore must be 'stale', 'stale\\+adapter' or 'knn' where tokens are dropped, got 'fused'."
    ):
        state.reduce(values(2, 7, 3), keep(3, 1, 'none')(6))
