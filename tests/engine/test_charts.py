"""Charts of many samples."""

import cv2
import numpy as np
import pytest
from dispatch_samples import DENSE, LAYERS, classified, sample, segmented

from mmdyt.engine.visualize import charts

SAMPLES = [segmented('a'), segmented('bc', shift=1.0), classified('def', shift=-1.0)]


def test_bars_are_mean_rates_and_whiskers_percentiles():
    axes = charts.layer_rates(SAMPLES).axes[0]
    rates = np.stack([one.masks.mean((1, 2, 3)) for one in SAMPLES])
    np.testing.assert_allclose([bar.get_height() for bar in axes.patches], rates.mean(0))
    assert [label.get_text() for label in axes.get_xticklabels()] == LAYERS
    (whiskers,) = axes.collections
    ends = np.stack([segment[:, 1] for segment in whiskers.get_segments()])
    np.testing.assert_allclose(ends, np.percentile(rates, [5, 95], axis=0).T)


def test_activation_by_class_is_that_of_the_pixels_of_the_class():
    axes = charts.by_class(SAMPLES).axes[0]
    pixels = [np.repeat(np.repeat(one.masks.mean((0, 1)), 10, 0), 12, 1)[5:] for one in SAMPLES[:2]]
    expected = {
        'sky (50.0%)': np.mean([p[:, :30] for p in pixels]),
        'car (50.0%)': np.mean([p[:, 30:] for p in pixels]),
    }
    found = {t.get_text(): bar.get_width() for t, bar in zip(axes.get_yticklabels(), axes.patches, strict=True)}
    assert found == pytest.approx(expected)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_distances_have_a_bar_each():
    axes = charts.by_boundary_distance(SAMPLES).axes[0]
    names = [label.get_text().split()[0] for label in axes.get_yticklabels()]
    assert names == ['0-4', '4-8', '8-16', '16-32', '32-64', '>64']


@pytest.mark.parametrize('chart', [charts.by_class, charts.by_boundary_distance])
def test_without_true_labels_there_is_no_chart(chart):
    assert chart(SAMPLES[2:]) is None and chart([]) is None


def test_the_histogram_counts_all_samples_and_marks_dense():
    axes = charts.costs(SAMPLES).axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 3
    assert axes.get_legend().get_texts()[0].get_text() == f'dense: {DENSE:.4g}'
    assert axes.lines[0].get_xdata()[0] == DENSE


@pytest.mark.parametrize('chart', [charts.layer_rates, charts.by_class, charts.by_boundary_distance, charts.costs])
@pytest.mark.parametrize('samples', [SAMPLES, [segmented('a')]], ids=['some', 'one'])
def test_every_chart_can_be_written(chart, samples, tmp_path):
    charts.write_figure(chart(samples), tmp_path / 'chart.png')
    assert min(cv2.imread(str(tmp_path / 'chart.png')).shape[:2]) > 100


def test_no_figure_stays_open():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    charts.costs([sample('a')])
    assert plt.get_fignums() == before
