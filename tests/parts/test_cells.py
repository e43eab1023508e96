"""Decisions of whole cells: their logits, counts and rules against loops over tokens."""

import pytest
import torch

from mmdyt.core.dispatch import BestTokens
from mmdyt.core.tokens import TokenState
from mmdyt.parts.cells import CellDispatcher
from mmdyt.parts.dispatcher import TokenDispatcher

DIM = 8
GRIDS = [(4, 6), (5, 7), (2, 2), (3, 1)]


def make(cell=(2, 2), **options) -> CellDispatcher:
    torch.manual_seed(0)
    dispatcher = CellDispatcher(DIM, cell=cell, **options).eval()
    torch.nn.init.normal_(dispatcher.gate.weight)
    return dispatcher


def tokens(grid, batch=2) -> torch.Tensor:
    return torch.randn(batch, 1 + grid[0] * grid[1], DIM, generator=torch.Generator().manual_seed(1))


def cells_of(grid, cell) -> list[list[int]]:
    """The patch tokens of each cell."""
    found = {}
    for row in range(grid[0]):
        for column in range(grid[1]):
            found.setdefault((row // cell[0], column // cell[1]), []).append(row * grid[1] + column)
    return [found[place] for place in sorted(found)]


@pytest.mark.parametrize('cell', [(1, 1), (2, 2), (2, 3), (8, 8)])
@pytest.mark.parametrize('grid', GRIDS)
def test_a_cell_has_the_mean_logit_of_its_tokens(grid, cell):
    dispatcher, x = make(cell), tokens(grid)
    dispatch = dispatcher(x, TokenState(1, grid=grid))
    logits = TokenDispatcher.score(dispatcher, x[:, 1:])[..., 0]
    for group in cells_of(grid, cell):
        mean = logits[:, group].mean(1, keepdim=True).expand(-1, len(group))
        torch.testing.assert_close(dispatch.logits[:, group, 0], mean)
        assert torch.equal(dispatch.patch_mask[:, group, 0], (dispatch.logits[:, group, 0] > 0).float())
    assert dispatch.mask[:, 0].all()


@pytest.mark.parametrize('capacity', [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize('cell', [(1, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize('grid', GRIDS)
def test_a_capacity_takes_the_best_cells_whole(grid, cell, capacity):
    dispatcher, x, groups = make(cell), tokens(grid), cells_of(grid, cell)
    dispatcher.set_rule(capacity=capacity)
    dispatch = dispatcher(x, TokenState(1, grid=grid))
    means = torch.stack([dispatch.logits[:, group[0], 0] for group in groups], dim=1)
    for i, scores in enumerate(means):
        best = scores.argsort(descending=True)[: round(capacity * len(groups))].tolist()
        active = sorted(token for cell_ in best for token in groups[cell_])
        assert dispatch.patch_mask[i, :, 0].nonzero().flatten().tolist() == active
    whole = grid[0] % cell[0] == grid[1] % cell[1] == 0
    assert isinstance(dispatch, BestTokens) == whole
    if whole:
        rows = dispatch.rows().view(2, -1) - torch.tensor([[0], [x.shape[1]]])
        assert sorted(rows[1].tolist()) == dispatch.mask[1, :, 0].nonzero().flatten().tolist()


@pytest.mark.parametrize('rule', [dict(threshold=0.0), dict(capacity=0.5)])
def test_cells_last_several_frames(rule):
    grid, frames = (4, 4), 4
    dispatcher, x = make(frames=2), tokens(grid, 2 * frames)
    dispatcher.set_rule(**rule)
    dispatch = dispatcher(x, TokenState(1, grid=grid, frames=frames))
    masks = dispatch.mask.view(4, 2, -1)
    assert torch.equal(masks[:, 0], masks[:, 1]) and not torch.equal(masks[0], masks[1])
    logits = TokenDispatcher.score(dispatcher, x[:, 1:]).view(4, 2, 2, 2, 2, 2).mean(dim=(1, 3, 5))
    torch.testing.assert_close(dispatch.logits.view(4, 2, 2, 2, 2, 2)[:, 0, :, 0, :, 0], logits)


@pytest.mark.parametrize('noise', [True, False])
def test_training_decides_for_cells_and_reaches_the_gate(noise):
    grid = (4, 5)
    dispatcher, x = make(noise=noise).train(), tokens(grid)
    dispatch = dispatcher(x, TokenState(1, grid=grid))
    for group in cells_of(grid, (2, 2)):
        values = dispatch.patch_mask[:, group, 0]
        assert torch.equal(values, values[:, :1].expand_as(values))
    dispatch.mask.sum().backward()
    assert dispatcher.gate.weight.grad.abs().sum() > 0


def test_cells_of_one_token_are_token_dispatch():
    grid, x = (3, 5), tokens((3, 5))
    cells, plain = make((1, 1)), TokenDispatcher(DIM).eval()
    plain.load_state_dict(cells.state_dict())
    for rule in (dict(threshold=0.1), dict(capacity=0.4)):
        cells.set_rule(**rule), plain.set_rule(**rule)
        assert torch.equal(cells(x, TokenState(1, grid=grid)).mask, plain(x).mask)


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        (dict(cell=2), 'cell must hold two positive numbers of tokens, got 2.'),
        (dict(cell=(2, 0)), 'cell must hold two positive numbers of tokens, got (2, 0).'),
        (dict(frames=0), 'frames must be at least 1, got 0.'),
    ],
)
def test_options_are_refused(arguments, expected):
    with pytest.raises(ValueError) as info:
        CellDispatcher(DIM, **arguments)
    assert str(info.value) == expected


@pytest.mark.parametrize(
    ('state', 'expected'),
    [
        (None, 'grid must be that of the 16 patch tokens for cells, got None.'),
        (TokenState(1, grid=(3, 4)), 'grid must be that of the 16 patch tokens for cells, got (3, 4).'),
        (TokenState(1, grid=(4, 4), frames=3), 'frames must divide the 3 frames of a clip, got 2.'),
    ],
)
def test_states_that_have_no_such_cells_are_refused(state, expected):
    with pytest.raises(ValueError) as info:
        make(frames=2)(tokens((4, 4)), state)
    assert str(info.value) == expected
