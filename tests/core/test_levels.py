"""Masks of levels: means over the branches that feed them, on the grid that a neck makes of theirs."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from mmdyt.core.dispatch import Dispatch
from mmdyt.core.levels import block_of, inactive_weights, level_masks, resize_masks

GRID = (2, 3)


def decided(*masks: list[int], prefix: int = 1, padding=None) -> dict[str, Dispatch]:
    """Of one image, by the blocks 0, 1, ...; None where a block is not dispatched."""
    found = {}
    for i, patches in enumerate(masks):
        if patches is not None:
            mask = torch.tensor([1.0] * prefix + [float(p) for p in patches]).reshape(1, -1, 1)
            found[f'backbone.layers.{i}.dynamic.mlp'] = dispatch = Dispatch(mask, None, prefix)
            dispatch.padding = padding
    return found


def features(batch: int = 1, *frames: int) -> torch.Tensor:
    return torch.zeros(batch, 8, *frames, *GRID)


@pytest.mark.parametrize('prefix', [0, 1, 5])
def test_a_level_has_the_mean_over_the_blocks_since_the_one_before(prefix):
    masks = decided([1] * 6, [0, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0] * 6, [1] * 6, prefix=prefix)
    first, second = level_masks(masks, (2, 0), features())
    assert first.tolist() == [[[[1.0] * 3, [1.0] * 3]]]
    assert second.tolist() == [[[[0.5, 1.0, 0.0], [0.0, 0.0, 0.0]]]]
    (whole,) = level_masks(masks, [4], features())
    torch.testing.assert_close(whole[0, 0, 0], torch.tensor([0.6, 0.8, 0.4]))


def test_attention_and_mlp_of_a_block_count_alike():
    both = decided([1] * 6) | {'layers.0.dynamic.attn': Dispatch(torch.zeros(1, 9, 1), None, 3)}
    assert level_masks(both, [0], features())[0].unique().item() == 0.5


def test_every_token_ran_where_nothing_is_dispatched():
    for masks in ({}, decided(None, None, [0] * 6)):
        found = level_masks(masks, (1, 3), features(1))
        assert [mask.shape for mask in found] == [(1, 1, *GRID)] * 2 and bool(found[0].all())
        assert bool(found[1].any()) == (not masks)


def test_rows_are_images_and_frames():
    mask = torch.arange(36.0).view(6, 6, 1)
    (clips,) = level_masks({'layers.0.dynamic.mlp': Dispatch(mask, None, 0)}, [0], features(2, 3))
    assert torch.equal(clips, torch.arange(36.0).view(2, 1, 3, *GRID))
    (images,) = level_masks({'layers.0.dynamic.mlp': Dispatch(mask, None, 0)}, [0], features(6))
    assert torch.equal(images, torch.arange(36.0).view(6, 1, *GRID))


@pytest.mark.parametrize('padded', [0.0, 1.0])
def test_padding_has_the_value_that_is_asked_for(padded):
    padding = torch.tensor([0, 0, 1, 0, 0, 1]).bool().view(1, 6, 1)
    (found,) = level_masks(decided([1, 0, 0, 1, 1, 0], padding=padding), [0], features(), padded)
    assert found.tolist() == [[[[1.0, 0.0, padded], [1.0, 1.0, padded]]]]


def test_the_gradient_is_that_of_the_masks():
    mask = torch.ones(1, 7, 1, requires_grad=True)
    masks = {f'layers.{i}.dynamic.mlp': Dispatch(mask, None, 1) for i in range(2)}
    level_masks(masks, [1], features())[0].sum().backward()
    assert mask.grad.flatten().tolist() == [0.0] + [1.0] * 6
    assert not inactive_weights(level_masks(masks, [1], features())[0], 1.0).requires_grad


def test_another_grid_is_refused():
    with pytest.raises(ValueError, match='grid must have one cell for each of 6 patch tokens, got'):
        level_masks(decided([1] * 6), [0], torch.zeros(1, 8, 3, 3))


def test_the_block_is_in_the_name():
    assert [block_of(name) for name in ('layers.3.dynamic.mlp', 'backbone.layers.11.dynamic.attn')] == [3, 11]


# how necks make features of these factors; of masks the mean in place of the greatest
NECKS = [
    (4, partial(F.interpolate, scale_factor=4, mode='nearest')),
    (3, partial(F.interpolate, scale_factor=3, mode='nearest')),
    (2, partial(F.interpolate, scale_factor=2, mode='nearest')),
    (1, lambda x: x),
    (0.5, partial(F.avg_pool2d, kernel_size=2)),
    (0.5, partial(F.interpolate, scale_factor=0.5, mode='bilinear')),
    (0.25, partial(F.avg_pool2d, kernel_size=4)),
    (1 / 3, partial(F.avg_pool2d, kernel_size=3)),
]


@pytest.mark.parametrize('size', [(8, 8), (5, 7), (6, 11), (4, 13)])
@pytest.mark.parametrize(('factor', 'resize'), NECKS)
def test_masks_are_resized_as_features_are(factor, resize, size):
    masks = torch.randint(0, 2, (3, 1, *size), generator=torch.Generator().manual_seed(0)).float()
    torch.testing.assert_close(resize_masks(masks, factor), resize(masks), rtol=0, atol=1e-6)


@pytest.mark.parametrize(('size', 'factor'), [((5, 8), 1.5), ((5, 8), 0.4), ((7, 9), 0.75), ((6, 6), 2.5)])
def test_parts_of_cells_count_by_their_area(size, factor):
    masks = torch.rand(2, 1, *size)
    found = resize_masks(masks, factor)
    assert found.shape[2:] == F.interpolate(masks, scale_factor=factor, mode='bilinear').shape[2:]
    torch.testing.assert_close(resize_masks(torch.ones_like(masks), factor), torch.ones_like(found))
    rows = torch.arange(size[0]).float().view(1, 1, -1, 1).expand(1, 1, *size)
    centres = (torch.arange(found.shape[2]) + 0.5) / factor - 0.5  # of areas, in cells before
    worst = (resize_masks(rows, factor)[0, 0, :, 0] - centres).abs().max().item()
    assert worst <= (0.5 if factor > 1 else 0.25)


def test_resized_masks_keep_gradient_dtype_and_precision():
    masks = (torch.arange(24.0).view(1, 1, 4, 6) / 3).requires_grad_()
    with torch.autocast('cpu', torch.bfloat16):
        found = resize_masks(masks, 0.5)
    torch.testing.assert_close(found, F.avg_pool2d(masks, 2))
    found.sum().backward()
    assert torch.equal(masks.grad, torch.full_like(masks, 0.25))


def test_a_grid_without_a_cell_left_is_refused():
    with pytest.raises(ValueError, match=r'factor must leave a cell of a grid of \(1, 4\), got 0.5'):
        resize_masks(torch.ones(1, 1, 1, 4), 0.5)


def test_weights_are_one_in_the_mean_and_grow_with_what_skipped():
    masks = torch.tensor([1.0, 0.5, 0.0, 0.5]).view(1, 1, 2, 2)
    assert inactive_weights(masks, 2.0).flatten().tolist() == [0.5, 1.0, 1.5, 1.0]
    assert inactive_weights(masks, 0.0).unique().item() == 1.0
    for same in (torch.ones(2, 1, 3, 3), torch.zeros(2, 1, 3, 3)):
        assert torch.equal(inactive_weights(same, 3.0), torch.ones_like(same))
