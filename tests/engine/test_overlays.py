"""Pictures of what ran over an image or a clip."""

import numpy as np
import pytest
from dispatch_samples import PALETTE, classified, sample, segmented

from mmdyt.engine.pictures import heat_map
from mmdyt.engine.visualize.overlays import (
    CELL,
    answers,
    contact,
    fit,
    layer_sheet,
    overlay,
    painted,
    palette,
    sheet,
    strip,
)

HEIGHT = CELL * 40 // 60  # of the pictures of a sheet
ROW = 24 + HEIGHT  # with a caption
NEXT = ROW + 8  # with white


def test_a_map_is_painted_over_grey_and_leaves_grey_what_was_not_seen():
    picture = np.full((4, 6, 3), [0, 0, 200], np.uint8)
    over = overlay(picture, np.array([[0.0, 1.0, np.nan]]), opacity=1.0)
    assert over.shape == picture.shape
    for column, colour in enumerate([*heat_map(np.array([[0.0, 1.0]]))[0], [60, 60, 60]]):
        assert (over[:, 2 * column : 2 * column + 2] == colour).all()
    half = overlay(picture, np.array([[1.0]]), opacity=0.5)
    np.testing.assert_allclose(half[0, 0], (heat_map(np.ones((1, 1)))[0, 0] + 60.0) / 2, atol=0.5)


def test_pictures_keep_their_shape():
    assert fit(np.zeros((100, 480, 3), np.uint8)).shape == (50, CELL, 3)
    assert fit(np.zeros((1, 1000, 3), np.uint8), 10).shape == (1, 10, 3)


@pytest.mark.parametrize('number, shape', [(1, (44, 30)), (3, (44, 106)), (4, (96, 106))])
def test_a_contact_sheet_has_rows_of_columns(number, shape):
    pictures = [np.full((20, 30, 3), i, np.uint8) for i in range(number)]
    laid = contact(pictures, [''] * number, columns=3)
    assert laid.shape == (*shape, 3)
    for i, picture in enumerate(pictures):
        top, left = i // 3 * 52 + 24, i % 3 * 38
        assert (laid[top : top + 20, left : left + 30] == picture).all()


def test_the_sheet_of_layers_shows_each_layer_in_order():
    one = sample('a', frames=2)
    laid, picture = layer_sheet(one, frame=1), fit(one.pictures[1])
    assert laid.shape == (ROW, 3 * CELL + 16, 3)
    for i, masks in enumerate(one.masks):
        left = i * (CELL + 8)
        assert (laid[24:, left : left + CELL] == overlay(picture, masks[1])).all()


def test_the_strip_shows_the_mean_over_the_layers_of_each_frame():
    clip = sample('clip', frames=3)
    laid = strip(clip)
    assert laid.shape == (ROW, 3 * CELL + 16, 3)
    for i in range(3):
        left, mean = i * (CELL + 8), clip.masks[:, i].mean(0)
        assert (laid[24:, left : left + CELL] == overlay(fit(clip.pictures[i]), mean)).all()


def test_labels_are_painted_in_the_palette_and_ignored_ones_black():
    both = painted(segmented('a'))
    assert set(both) == {'truth', 'prediction'}
    assert both['truth'][0, 0].tolist() == [0, 0, 0] and both['truth'][10, 50].tolist() == PALETTE[1][::-1]
    assert both['prediction'][35, 0].tolist() == PALETTE[2][::-1]
    assert painted(classified('a')) == {}


def test_classes_without_a_palette_have_colours_of_their_own():
    one = segmented('a')
    one.palette = []
    assert len(set(palette(one))) == 3


@pytest.mark.parametrize(
    'one, words',
    [
        (classified('a'), dict(truth='dog', prediction='bee (0.70)')),
        (sample('a', prediction=np.int64(4)), dict(prediction='class 4')),
        (sample('a', prediction=0, scores=np.array([1.0])), dict(prediction='class 0 (1.00)')),
        (segmented('a'), {}),
        (sample('a'), {}),
    ],
)
def test_what_a_classification_is_and_was_taken_for(one, words):
    assert answers(one) == words


@pytest.mark.parametrize(
    'one, options, lines, rows, columns',
    [
        (segmented('a'), {}, 2, 2, 4),  # image, truth, prediction, mean
        (classified('a'), {}, 3, 2, 3),
        (sample('a'), {}, 2, 2, 3),
        (sample('a', frames=6), {}, 2, 3, 4),
        (sample('a', frames=6), dict(frames=[0, 5]), 2, 4, 4),
        (sample('a', frames=6), dict(frames=[]), 2, 2, 4),
    ],
)
def test_a_sheet_holds_numbers_overview_and_layers(one, options, lines, rows, columns):
    sheets_of_frames = len(options.get('frames', [0])) if len(one.pictures) > 1 else 0
    height = 24 * lines + 8 + rows * NEXT + sheets_of_frames * 32 + 24
    assert sheet(one, **options).shape == (height + 16, columns * (CELL + 8) - 8 + 16, 3)


def test_a_sheet_of_what_no_layer_saw_can_be_drawn():
    one = segmented('a')
    one.masks[2] = one.masks[:, :, :2] = np.nan
    one.masks[2, 0, 3, 0] = 1
    assert sheet(one).dtype == np.uint8


def test_any_name_of_a_file_can_be_written_on_a_sheet():
    for name in ('a\udcff.jpg', 'b\n.jpg', 'ü雪.jpg'):
        assert sheet(classified(name)).shape[2] == 3
