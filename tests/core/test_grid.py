"""Where tokens are in the image."""

from dataclasses import replace

import pytest
import torch

from mmdyt.core.dispatch import Dispatch
from mmdyt.core.grid import DispatchMap, View, active_share, agreement, neighbours_alike, windows


def dispatch(*patches: int, prefix: int = 1) -> Dispatch:
    mask = torch.tensor([1.0] * prefix + [float(p) for p in patches]).reshape(1, -1, 1)
    return Dispatch(mask, None, prefix)


@pytest.mark.parametrize('prefix', [0, 1, 5])
def test_active_share_is_the_mean_over_branches_on_the_grid(prefix):
    layers = [dispatch(1, 1, 0, 0, 0, 1, prefix=prefix), dispatch(0, 1, 0, 0, 1, 1, prefix=prefix)]
    share = active_share(layers, (2, 3))
    assert share.tolist() == [[[0.5, 1.0, 0.0], [0.0, 0.5, 1.0]]]


def test_active_share_keeps_the_batch():
    mask = torch.stack([torch.zeros(7, 1), torch.ones(7, 1)])
    share = active_share([Dispatch(mask, None, 1)] * 3, (3, 2))
    assert share.shape == (2, 3, 2)
    assert share[0].sum() == 0 and share[1].sum() == 6


def test_active_share_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match='grid must have one cell for each of 4 patch tokens, got'):
        active_share([dispatch(1, 0, 1, 0)], (2, 3))
    with pytest.raises(ValueError, match='dispatches must hold at least one dispatch'):
        active_share([], (2, 3))


def test_a_branch_that_saw_no_patch_counts_as_inactive():
    seen, unseen = torch.ones(1, 5, 1), torch.ones(1, 1, 1)
    share = active_share([Dispatch(seen, None, 1), Dispatch(unseen, None, 1)], (2, 2))
    assert torch.equal(share, torch.full((1, 2, 2), 0.5))


# where cells lie, by pixels: an image of 4 x 6 pixels, patches of 2 x 2
IMAGE, PATCH = (4, 6), (2, 2)


def seen(view: View, grid: tuple[int, int], image=IMAGE) -> torch.Tensor:
    """The number of the window's cell that covers each pixel of the whole image, -1 where none does, by brute force."""
    height, width = view.image
    pixels = torch.full((height, width), -1)
    for row in range(grid[0]):
        for column in range(grid[1]):
            top, left = view.top + row * view.patch[0], view.left + column * view.patch[1]
            pixels[top : top + view.patch[0], left : left + view.patch[1]] = row * grid[1] + column
    axes = dict(none=[], horizontal=[1], vertical=[0], diagonal=[0, 1])[view.flip]
    pixels = pixels.flip(axes)
    scale = image[0] // height, image[1] // width
    return pixels.repeat_interleave(scale[0], 0).repeat_interleave(scale[1], 1)


VIEWS = dict(
    whole=(View(IMAGE, PATCH), (2, 3)),
    window=(View(IMAGE, PATCH, top=2, left=4), (1, 1)),
    between_cells=(View(IMAGE, PATCH, top=1, left=3), (1, 1)),
    flipped=(View(IMAGE, PATCH, flip='horizontal'), (2, 3)),
    upside_down=(View(IMAGE, PATCH, flip='vertical', left=2), (2, 2)),
    turned=(View(IMAGE, PATCH, flip='diagonal', top=1), (1, 3)),
    half_size=(View((2, 3), PATCH), (1, 2)),  # the last column reaches into padding
    padded=(View(IMAGE, PATCH), (3, 5)),
    wide_cells=(View(IMAGE, (4, 1)), (1, 6)),
)


@pytest.mark.parametrize('flip', ['none', 'horizontal'])
@pytest.mark.parametrize('name', VIEWS)
def test_a_map_has_the_mean_of_what_covers_each_cell(name, flip):
    (view, grid), generator = VIEWS[name], torch.Generator().manual_seed(0)
    view = replace(view, flip=flip if view.flip == 'none' else view.flip)
    masks = torch.randint(0, 2, (2, *grid), generator=generator).double()
    found = DispatchMap(IMAGE, PATCH)
    found.add(masks, view)
    pixels = seen(view, grid)
    values = torch.where(pixels >= 0, masks.flatten(1)[:, pixels], torch.nan)
    expected = values.unflatten(2, (3, 2)).unflatten(1, (2, 2)).permute(0, 1, 3, 2, 4).flatten(3).nanmean(3)
    torch.testing.assert_close(found.mean(), expected, equal_nan=True)


def test_views_are_averaged_by_what_they_cover():
    found = DispatchMap(IMAGE, PATCH)
    found.add(torch.ones(2, 3), View(IMAGE, PATCH))
    found.add(torch.zeros(1, 1), View(IMAGE, PATCH, left=3))
    torch.testing.assert_close(found.mean(), torch.tensor([[1, 2 / 3, 2 / 3], [1, 1, 1]]).double())
    with pytest.raises(ValueError, match='masks must be added before their mean is asked for'):
        DispatchMap(IMAGE, PATCH).mean()


@pytest.mark.parametrize('second', VIEWS)
@pytest.mark.parametrize('first', VIEWS)
def test_agreement_is_the_share_of_equal_pixels_that_both_show(first, second):
    generator = torch.Generator().manual_seed(0)
    (view, grid), (other, other_grid) = VIEWS[first], VIEWS[second]
    masks = torch.randint(0, 2, (3, *grid), generator=generator)
    others = torch.randint(0, 2, (3, *other_grid), generator=generator)
    share, area = agreement(masks, view, others, other)
    mine, theirs = seen(view, grid), seen(other, other_grid)
    both = (mine >= 0) & (theirs >= 0)
    equal = masks.flatten(1)[:, mine[both]] == others.flatten(1)[:, theirs[both]]
    assert area == pytest.approx(both.double().mean().item())
    torch.testing.assert_close(share, equal.double().mean(1), equal_nan=True)


def test_neighbours_are_beside_and_above():
    masks = torch.tensor([[[1, 1, 0], [1, 0, 0]], [[0, 0, 0], [0, 0, 0]]])
    assert neighbours_alike(masks).tolist() == [(2 + 2) / 7, 1]
    assert neighbours_alike(torch.ones(1, 1)).isnan()


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        (dict(image=(0, 4), patch=(2, 2)), 'image and patch must be positive, got (0, 4) and (2, 2).'),
        (dict(image=(4, 4), patch=(2, 2), flip='left'), 'flip must be one of'),
    ],
)
def test_views_that_cannot_be_are_refused(arguments, expected):
    with pytest.raises(ValueError) as info:
        View(**arguments)
    assert str(info.value).startswith(expected)


@pytest.mark.parametrize(
    ('image', 'crop', 'stride', 'expected'),
    [
        ((4, 4), (4, 4), (2, 2), [(0, 0, 4, 4)]),
        ((3, 9), (4, 4), (3, 3), [(0, 0, 3, 4), (0, 3, 3, 4), (0, 5, 3, 4)]),
        ((5, 4), (4, 4), (2, 2), [(0, 0, 4, 4), (1, 0, 4, 4)]),
    ],
)
def test_windows_end_with_the_image(image, crop, stride, expected):
    assert windows(image, crop, stride) == expected


def test_the_slide_of_the_paper_has_its_windows():
    found = windows((512, 683), (512, 512), (341, 341))  # ADE20K: the shorter side is 512
    assert found == [(0, 0, 512, 512), (0, 171, 512, 512)]
