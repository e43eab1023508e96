"""Activation by class and by the distance to a boundary, against loops over pixels."""

import numpy as np
import pytest

from mmdyt.engine.visualize.sample import SampleDispatch
from mmdyt.engine.visualize.where import (
    EDGES,
    boundary_distance,
    by_boundary_distance,
    by_class,
    mean,
    mean_map,
    to_pixels,
    total,
)

LABELS = {
    'two halves': np.repeat([[0, 1]], 6, 0).repeat(5, 1),
    'one class': np.zeros((4, 5), int),
    'ignored': np.array([[0, 255, 1, 1, 1], [0, 255, 1, 1, 2], [0, 0, 255, 1, 1]]),
    'all ignored': np.full((3, 3), 255),
    'a row': np.array([[0] * 40 + [2] * 60]),
    'chance': np.random.default_rng(0).choice([0, 1, 2, 255], (12, 17)),
}


def shares(labels, seed=1):
    share = np.random.default_rng(seed).random(labels.shape)
    share[0, 0] = np.nan
    return share


def boundary_of(labels):
    """All pixels with a neighbour of another class, by hand."""
    found, (height, width) = [], labels.shape
    for y, x in np.ndindex(*labels.shape):
        beside = [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        others = [labels[j, i] for j, i in beside if 0 <= j < height and 0 <= i < width]
        if labels[y, x] != 255 and any(other not in (labels[y, x], 255) for other in others):
            found.append((y, x))
    return found


@pytest.mark.parametrize('labels', LABELS.values(), ids=LABELS)
def test_distances_are_those_to_the_nearest_boundary_pixel(labels):
    boundary = boundary_of(labels)
    expected = [
        [min((np.hypot(y - j, x - i) for j, i in boundary), default=np.inf) for x in range(labels.shape[1])]
        for y in range(labels.shape[0])
    ]
    np.testing.assert_allclose(boundary_distance(labels), expected, rtol=1e-5)


@pytest.mark.parametrize('labels', LABELS.values(), ids=LABELS)
def test_counts_by_class_are_those_of_a_loop(labels):
    share, expected = shares(labels), np.zeros((2, 3))
    for label, value in zip(labels.flat, share.flat, strict=True):
        if label != 255 and not np.isnan(value):
            expected[:, label] += value, 1
    np.testing.assert_allclose(by_class(share, labels, 3), expected, rtol=1e-12)


@pytest.mark.parametrize('labels', LABELS.values(), ids=LABELS)
def test_counts_by_distance_are_those_of_a_loop(labels):
    share, expected, distances = shares(labels), np.zeros((2, len(EDGES) - 1)), boundary_distance(labels)
    for label, value, distance in zip(labels.flat, share.flat, distances.flat, strict=True):
        if label != 255 and not np.isnan(value):
            expected[:, max(i for i in range(len(EDGES) - 1) if distance >= EDGES[i])] += value, 1
    np.testing.assert_allclose(by_boundary_distance(share, labels), expected, rtol=1e-12)


def test_a_bin_includes_its_lower_edge():
    row = np.array([[0] * 80 + [1]])
    assert by_boundary_distance(np.ones(row.shape), row)[1].tolist() == [5, 4, 8, 16, 32, 16]


def test_classes_that_the_model_does_not_have_are_not_counted():
    assert by_class(np.ones((1, 3)), np.array([[0, 7, 1]], np.uint8), 2).tolist() == [[1, 1], [1, 1]]


def test_the_mean_map_is_over_the_branches_that_saw_a_cell():
    nan = np.nan
    masks = np.array([[1.0, nan, 0.5, nan], [0.0, 1.0, 0.5, nan]])
    np.testing.assert_array_equal(mean_map(masks), [0.5, 1.0, 0.5, nan])


def test_pixels_take_the_value_of_their_cell():
    assert to_pixels(np.array([[1, 2]]), 2, 5).tolist() == [[1, 1, 1, 2, 2]] * 2
    assert to_pixels(np.array([[1, 2, 3]]), 1, 5, (1.0, 6 / 5)).tolist() == [[1, 1, 2, 2, 3]]  # cells of 2 pixels


def test_counts_of_samples_add_up_and_samples_without_labels_are_left_out():
    labels = LABELS['two halves']
    some = [
        SampleDispatch(str(truth), ['layer_0'], np.full((1, 1, 2, 2), share), [], 1.0, 1.0, truth=truth)
        for share, truth in ((1.0, labels), (0.5, labels), (0.0, 3), (0.0, None))
    ]
    counts = total(some, lambda share, truth: by_class(share, truth, 3))
    assert counts.tolist() == [[45, 45, 0], [60, 60, 0]]
    np.testing.assert_array_equal(mean(counts), [0.75, 0.75, np.nan])
    assert total(some[2:], by_boundary_distance) is None
