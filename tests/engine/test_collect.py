"""What pictures are drawn from: maps, costs that add up, pictures, predictions and truths, in three tasks."""

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner, set_random_seed

from mmdyt import preflight
from mmdyt.core.fit.calibrate import token_dispatchers
from mmdyt.engine.own_images import name_in_dataset
from mmdyt.engine.visualize.collect import Collector, _outcome
from mmdyt.engine.visualize.sample import SampleDispatch


@pytest.fixture(params=['classification', 'segmentation', 'video'])
def runner(request, tmp_path):
    """A runner of a test of a tiny model with gates that differ between tokens."""
    name = dict(classification='tiny_cls_config', segmentation='tiny_config', video='tiny_video_config')[request.param]
    cfg = Config.fromfile(request.getfixturevalue(name))
    cfg.work_dir, cfg.custom_hooks = str(tmp_path), []
    cfg.test_dataloader.num_workers, cfg.test_dataloader.persistent_workers = 0, False
    set_random_seed(0)
    runner = preflight.build_runner(cfg)
    for dispatcher in token_dispatchers(runner.model).values():
        torch.nn.init.normal_(dispatcher.gate.weight)
    runner.model.eval()
    runner.task = request.param
    return runner


def collect(runner: Runner) -> list[SampleDispatch]:
    loader = runner.test_dataloader
    loader = loader if not isinstance(loader, dict) else runner.build_dataloader(loader)
    classes = loader.dataset.metainfo.get('classes') or ()
    found = []
    palette, name = loader.dataset.metainfo.get('palette') or (), name_in_dataset(loader)
    with Collector(runner.model, classes, palette, name) as collector, torch.no_grad():
        for batch in loader:
            found += collector.take(batch, runner.model.test_step(batch))
    return found


def test_samples_have_all_that_is_drawn(runner):
    samples = collect(runner)
    assert len({sample.name for sample in samples}) == len(samples) > 1
    for sample in samples:
        assert sample.masks.shape[:2] == (len(sample.layers), len(sample.pictures))
        assert sample.logits.shape == sample.masks.shape
        assert {picture.dtype for picture in sample.pictures} == {np.dtype(np.uint8)}
        assert sample.pictures[0].ndim == 3 and len({picture.shape for picture in sample.pictures}) == 1
        rows, columns = sample.masks.shape[2:]
        patch = runner.model.backbone.patch_embed.projection.stride
        height, width = sample.pictures[0].shape[:2]
        assert sample.extent == pytest.approx((rows * patch[0] / height, columns * patch[1] / width))
        if runner.task == 'segmentation':
            assert sample.prediction.shape == sample.truth.shape == sample.pictures[0].shape[:2]
        else:
            assert 0 <= sample.prediction == sample.scores.argmax() and 0 <= sample.truth < len(sample.scores)
        of_branches = zip(sample.rates(), sample.costs, strict=True)
        macs = sum(np.interp(rate, *zip(*cost.points, strict=True)) for rate, cost in of_branches)
        assert sample.gmacs == pytest.approx(sample.gmacs_rest + macs / 1e9)


def test_the_parts_of_the_cost_are_those_of_the_branches(runner):
    for sample in collect(runner):
        costs = [dict(cost.points) for cost in sample.costs]
        assert [cost.label for cost in sample.costs] == list(sample.layers)
        assert all(cost[0.0] == 0 and list(cost.values()) == sorted(cost.values()) for cost in costs)
        complete = sample.gmacs_rest + sum(cost[1.0] for cost in costs) / 1e9
        assert complete > sample.gmacs_dense  # adapters and gates come on top
        assert complete < 1.5 * sample.gmacs_dense


@pytest.mark.parametrize('break_even', [0.3, 0.6, 1.0])
def test_the_cost_jumps_where_all_tokens_run_at_once(runner, break_even):
    runner.model.backbone.set_break_even(break_even)
    for sample in collect(runner):
        prefix, patches = runner.model.backbone.num_extra_tokens, sample.masks[0, 0].size
        for cost in sample.costs:
            shares, macs = map(np.array, zip(*cost.points, strict=True))
            assert (np.diff(shares) > 0).all() and shares[-1] == 1
            if break_even < 1:
                jump = np.diff(macs).argmax()
                assert shares[jump] == pytest.approx((break_even * (prefix + patches) - prefix) / patches)
                assert (macs[jump + 1 :] == macs[-1]).all() and macs[jump] < 0.9 * macs[-1]


def test_pictures_are_those_of_the_files(runner):
    sample = collect(runner)[0]
    if runner.task == 'segmentation':
        assert np.array_equal(sample.pictures[0], cv2.imread(sample.name))
        return
    channel = sample.pictures[0].reshape(-1, 3).mean(0).argmax()  # blue first: the classes are told by their colour
    assert channel == (2 - sample.truth if runner.task == 'video' else sample.truth)  # whose clips are made red first


def test_without_dispatchers_there_is_nothing_to_draw(tiny_cls_config, tmp_path):
    cfg = Config.fromfile(tiny_cls_config)
    cfg.work_dir, cfg.custom_hooks, cfg.model.backbone.dispatcher = str(tmp_path), [], None
    runner = preflight.build_runner(cfg)
    with pytest.raises(
        ValueError,
        match='model must have dispatchers, or parts .*, got none',
    ):
        collect(runner)


@pytest.mark.parametrize(('shape', 'kept'), [((3,), True), ((1, 3), True), ((2, 3), False)])
def test_scores_are_those_of_the_clip(shape, kept):
    from mmaction.structures import ActionDataSample

    output = ActionDataSample()
    output.set_field(torch.rand(shape), 'pred_score')
    found = _outcome(output, (8, 8))
    assert ('scores' in found) == kept and (not kept or found['scores'].shape == (3,))
