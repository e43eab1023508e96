"""Pictures of predictions and of active tokens."""

import numpy as np

from mmdyt.engine.pictures import beside, framed, heat_map, legend, paint_labels, picture_table, stack


def test_labels_take_the_colours_of_the_palette_blue_first():
    painted = paint_labels(np.array([[0, 1, 255]], np.uint8), [[255, 0, 10], [1, 2, 3]])
    assert painted.tolist() == [[[10, 0, 255], [3, 2, 1], [0, 0, 0]]]


def test_heat_grows_with_the_share():
    heat = heat_map(np.linspace(0, 1, 9).reshape(3, 3))
    assert heat.shape == (3, 3, 3) and heat.dtype == np.uint8
    brightness = heat.sum(-1).ravel().astype(int)
    assert (np.diff(brightness) > 0).all()


def test_table_scales_without_smoothing():
    corners = np.zeros((2, 2, 3), np.uint8)
    corners[0, 0] = 200
    table = picture_table(['a', 'b'], [[corners, corners]] * 3, cell=40)
    assert table.shape == (24 + 3 * (8 + 40), 40 + 8 + 40, 3)
    first = table[32:72, :40]
    assert (first[:20, :20] == 200).all() and first.sum() == 200 * 20 * 20 * 3


def test_legend_shows_every_colour():
    colours = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]], np.uint8)
    strip = legend(['x', 'y', 'z'], colours, 300)
    for x, colour in zip((0, 100, 200), colours, strict=True):
        assert (strip[8:16, x + 1 : x + 11] == colour).all()


def test_beside_stack_and_frame_add_white():
    grey = np.full((10, 6, 3), 9, np.uint8)
    assert beside([grey, grey]).shape == (10, 20, 3)
    assert stack([grey, grey]).shape == (28, 6, 3)
    edge = framed(grey)
    assert edge.shape == (26, 22, 3) and (edge[0] == 255).all()
