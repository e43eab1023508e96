"""Scores, weights and losses of halting tokens against loops over tokens, and what is refused."""

import math

import pytest
import torch
import torch.nn as nn

from mmdyt.core.dispatch import Dispatch, without_padding
from mmdyt.core.halting import Halting, block_scores, depth_of, prior_loss, remainder
from mmdyt.core.tokens import TokenState
from mmdyt.parts.halting import HALTING, HaltedOutput, HaltingDispatcher

DIM, DEPTH, EPS = 8, 6, 0.01


def by_hand(scores: list[float], eps: float = EPS) -> tuple[list[float], int, float]:
    """Weights p of all blocks, n and R of a token with these scores; that of the last block is 1."""
    total, weights = 0.0, []
    for n, score in enumerate([*scores, 1.0], start=1):
        if total + score >= 1 - eps:
            return weights + [1 - total] + [0.0] * (len(scores) + 1 - n), n, 1 - total
        weights.append(score)
        total += score
    raise AssertionError('the last block halts every token')


def drawn(tokens=50) -> torch.Tensor:
    """Scores (T, L - 1): of tokens that halt early, late and never before the last block."""
    torch.manual_seed(0)
    scores = torch.rand(tokens, DEPTH - 1, dtype=torch.float64) * torch.rand(tokens, 1, dtype=torch.float64)
    scores[0], scores[1], scores[2, 0] = 0.0, 1.0, 1.0
    return scores


def halting(scores, values) -> tuple[torch.Tensor, Halting]:
    """The weighted sum of values (T, L, C), and what a pass keeps."""
    found = Halting(EPS)
    for block in range(DEPTH - 1):
        found = found.step(scores[None, :, block, None], values[None, :, block])
    return found.total(values[None, :, -1])[0], found


def test_the_output_is_the_sum_by_the_weights_and_these_sum_to_one():
    scores = drawn()
    values = torch.randn(len(scores), DEPTH, DIM, dtype=torch.float64)
    out, _ = halting(scores, values)
    weights = torch.tensor([by_hand(row.tolist())[0] for row in scores], dtype=torch.float64)
    assert {by_hand(row.tolist())[1] for row in scores} >= {1, 2, 3, DEPTH}
    torch.testing.assert_close(out, (weights[..., None] * values).sum(1), rtol=0, atol=1e-12)
    constant = torch.ones_like(values)
    torch.testing.assert_close(halting(scores, constant)[0], constant[:, 0], rtol=0, atol=1e-12)


def left_behind(scores) -> torch.Tensor:
    """(T, L - 1): what is left of each token behind each block, as dispatchers tell it as logits."""
    found, left = Halting(EPS), []
    for block in range(DEPTH - 1):
        found = found.step(scores[None, :, block, None], torch.zeros(1, len(scores), 1))
        left.append(found.left[0, :, 0])
    return torch.stack(left, dim=1)


def test_depths_remainders_and_scores_are_those_of_single_tokens():
    scores = drawn()
    left, told = left_behind(scores), [by_hand(row.tolist()) for row in scores]
    assert depth_of(left, DEPTH).tolist() == [n for _, n, _ in told]
    expected = torch.tensor([rest for _, _, rest in told], dtype=torch.float64)
    torch.testing.assert_close(remainder(left, EPS), expected, rtol=0, atol=1e-12)
    rows = [[*row.tolist(), 1.0][:n] + [0.0] * (DEPTH - n) for row, (_, n, _) in zip(scores, told, strict=True)]
    torch.testing.assert_close(block_scores(left, EPS), torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_prior_is_a_normalised_gaussian_and_its_loss_a_divergence():
    blocks = torch.arange(1.0, DEPTH + 1, dtype=torch.float64)
    bell = [math.exp(-((block - 4) ** 2) / (2 * 0.5**2)) for block in range(1, DEPTH + 1)]
    prior = torch.tensor([b / sum(bell) for b in bell], dtype=torch.float64)
    assert abs(prior_loss(prior[None], blocks, 4.0, 0.5)) < 1e-6
    assert abs(prior_loss(0.3 * prior.expand(5, -1), blocks, 4.0, 0.5)) < 1e-6
    flat = torch.full((3, DEPTH), 0.2, dtype=torch.float64)
    expected = sum(q * math.log(q * DEPTH) for q in prior.tolist())
    assert prior_loss(flat, blocks, 4.0, 0.5).item() == pytest.approx(expected)
    none_left = torch.cat([flat[:, :-1], torch.zeros(3, 1, dtype=torch.float64)], dim=1)
    assert prior_loss(none_left, blocks, 4.0, 0.5).isfinite()


def chain(**options) -> list[HaltingDispatcher]:
    torch.manual_seed(0)
    found = [HaltingDispatcher(DIM, index=index, depth=DEPTH, **options) for index in range(DEPTH)]
    for dispatcher, before in zip(found, [None, *found], strict=False):
        dispatcher.follow(before)
        if dispatcher.gate is not None:
            nn.init.normal_(dispatcher.gate.weight)
            nn.init.constant_(dispatcher.gate.bias, -1.5)
    return found


def tokens(batch=2, number=7) -> list[torch.Tensor]:
    """Values in front of each block."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, number, DIM, generator=generator) for _ in range(DEPTH)]


def decide(dispatchers, values, padding=None) -> list[Dispatch]:
    state = TokenState(1, padding=padding)
    return [without_padding(d(x, state), padding) for d, x in zip(dispatchers, values, strict=True)]


@pytest.mark.parametrize('options', [dict(), dict(score='shared'), dict(score='channel', beta=1.0)], ids=str)
def test_masks_are_those_of_single_tokens_and_no_token_comes_back(options):
    dispatchers, values = chain(**options), tokens()
    masks = torch.stack([decision.mask for decision in decide(dispatchers, values)])[..., 0]  # (L, B, N)
    assert 0 < masks[1:].mean() < 1 and masks[0].all() and masks[:, :, 0].all()
    assert (masks[1:] <= masks[:-1]).all()
    for image in range(2):
        for token in range(1, 7):
            scores = []
            for dispatcher, x in zip(dispatchers[1:], values[1:], strict=True):
                own = x[image, token]
                logit = 10 * own[0] - 1 if options.get('beta') else dispatcher.scorer(own)
                scores.append(torch.sigmoid(logit).item())
            n = by_hand(scores)[1]
            assert masks[:, image, token].tolist() == [1.0] * n + [0.0] * (DEPTH - n)


def test_a_shared_gate_is_held_once():
    dispatchers = chain(score='shared')
    assert sum(p.numel() for p in nn.ModuleList(dispatchers).parameters()) == DIM + 1
    assert {id(d.scorer) for d in dispatchers[1:]} == {id(dispatchers[1].gate)}
    assert sum(p.numel() for p in nn.ModuleList(chain()).parameters()) == (DEPTH - 1) * (DIM + 1)
    assert not list(nn.ModuleList(chain(score='channel')).parameters())


def test_the_losses_are_those_of_single_patch_tokens_and_padding_is_none():
    dispatchers, values = chain(ponder_weight=2.0, prior_weight=3.0, prior=(0.5, 0.8)), tokens()
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    decided = decide(dispatchers, values, padding)
    assert not any(decision.patch_mask[padding].any() for decision in decided)
    losses, ponder, scores, depths = dispatchers[-1].losses(decided), [], [], []
    for image, token in (~padding).nonzero().tolist():
        pairs = zip(dispatchers[1:], values[1:], strict=True)
        own = [torch.sigmoid(d.gate(x[image, 1 + token])).item() for d, x in pairs]
        _, n, rest = by_hand(own)
        ponder.append(n + rest)
        depths.append(n)
        scores.append([*own, 1.0][:n] + [0.0] * (DEPTH - n))
    blocks = torch.arange(1.0, DEPTH + 1)
    expected = prior_loss(torch.tensor(scores), blocks, 0.5 * DEPTH, 0.8)
    assert losses['loss_ponder'].item() == pytest.approx(2 * sum(ponder) / len(ponder), rel=1e-5)
    assert losses['loss_prior'].item() == pytest.approx(3 * expected.item(), rel=1e-4)
    assert losses['halting_depth'].item() == pytest.approx(sum(depths) / len(depths))


def test_at_the_start_nothing_halts_and_every_gate_learns_from_the_losses():
    dispatchers = [HaltingDispatcher(DIM, index=index, depth=12) for index in range(12)]
    values = [torch.randn(2, 7, DIM) for _ in dispatchers]
    decided = decide(dispatchers, values)
    assert all(decision.mask.all() for decision in decided)
    losses = dispatchers[-1].losses(decided)
    (losses['loss_ponder'] + losses['loss_prior']).backward()
    for dispatcher in dispatchers[1:]:
        assert dispatcher.gate.weight.grad.abs().sum() > 0
    assert dispatchers[8].gate.bias.grad < 0  # more of the prior's middle
    state = TokenState(1)
    for dispatcher, x in zip(dispatchers, values, strict=True):
        dispatcher(x, state)
    assert state.decided[HALTING].left[:, 0].add(0.01).min().item() == pytest.approx(1 - 0.0736, abs=1e-3)


def test_prompts_have_no_score_and_padding_does_not_run_the_first_layer():
    dispatchers, values = chain(), tokens(number=9)
    state, plain = TokenState(1, prompts=2), TokenState(1)
    for dispatcher, x in zip(dispatchers, values, strict=True):
        found, expected = dispatcher(x, state), dispatcher(torch.cat([x[:, :1], x[:, 3:]], dim=1), plain)
        assert found.num_prefix_tokens == 3 and found.mask[:, :3].all()
        assert torch.equal(found.patch_mask, expected.patch_mask)
    out = HaltedOutput()(values[-1], state)
    assert torch.equal(out[:, 1:], values[-1][:, 1:]) and not torch.equal(out[:, 0], values[-1][:, 0])
    padding = torch.eye(8)[:2].bool()
    assert torch.equal(decide(dispatchers, values, padding)[0].patch_mask[..., 0] == 0, padding)


def test_what_is_no_number_is_not_hidden():
    dispatchers, values = chain(), tokens()
    for x in values[2:]:
        x[0, 0] = torch.nan
    state = TokenState(1)
    for dispatcher, x in zip(dispatchers, values, strict=True):
        dispatcher(x, state)
    out = HaltedOutput()(values[-1], state)
    assert out[0, 0].isnan().all() and out[1].isfinite().all()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(score='token'), 'score must be one of'),
        (dict(maps='last'), 'maps must be one of'),
        (dict(eps=1.0), r'eps must lie in \[0, 1\)'),
        (dict(beta='5'), 'beta must be a finite number'),
        (dict(gamma=10.0), "gamma must be None unless score is 'channel'"),
        (dict(ponder_weight=-1.0), 'ponder_weight must be at least 0'),
        (dict(prior_weight=math.nan), 'prior_weight must be at least 0'),
        (dict(prior=8), 'prior must be a mean and a standard deviation'),
        (dict(prior=(8, 1)), 'prior must have a mean in'),
        (dict(prior=(0.5, 0.0)), 'prior must have a mean in'),
        (dict(num_prefix_tokens=-1), 'num_prefix_tokens must be at least 0'),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HaltingDispatcher(DIM, **options)
