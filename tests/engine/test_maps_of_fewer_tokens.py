"""Where tokens are fewer: rates, maps and costs of samples, in the coordinates of the image, in three hosts."""

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import set_random_seed

from mmdyt import preflight
from mmdyt.engine.costs import CostCounter
from mmdyt.engine.maps import MapRecorder
from mmdyt.engine.visualize.collect import Collector
from mmdyt.preflight.methods import use_method

TASKS = dict(classification='tiny_cls_config', segmentation='tiny_config', video='tiny_video_config')


@pytest.fixture(params=TASKS)
def runner_of(request, tmp_path):
    def build(method, **options):
        cfg = Config.fromfile(request.getfixturevalue(TASKS[request.param]))
        use_method(cfg, method, options)
        cfg.work_dir, cfg.custom_hooks = str(tmp_path), []
        cfg.test_dataloader.num_workers, cfg.test_dataloader.persistent_workers = 0, False
        set_random_seed(0)
        runner = preflight.build_runner(cfg)
        runner.model.eval()
        return runner

    return build


@pytest.mark.parametrize(
    ('method', 'options'),
    [('tome', dict(r=1)), ('sparse_tuning', dict(keep_rate=0.5)), ('tome', dict(r=1, scope='mlp'))],
)
@torch.no_grad()
def test_rates_and_maps_are_what_is_left_of_the_image(runner_of, method, options):
    runner = runner_of(method, **options)
    batch = next(iter(runner.build_dataloader(runner.cfg.test_dataloader)))
    with CostCounter(runner.model) as counter, MapRecorder(runner.model) as recorder:
        counter.add_samples(runner.model.test_step(batch))
        maps = recorder.take()
    lines, backbone = counter.take().lines(), runner.model.backbone
    if options.get('scope') == 'mlp':
        assert maps == [] and all(line['rates'] == {} for line in lines)
        return
    for line, found in zip(lines, maps, strict=True):
        rows, columns = found.looks[0].masks.shape[-2:]
        left, expected = rows * columns, []
        for layer in backbone.layers:
            left = layer.patches_after(left, 1)
            expected.append(left / (rows * columns))
        assert list(line['rates'].values()) == pytest.approx(expected) and expected[-1] < 1
        assert found.layers == list(line['rates'])
        for look in found.looks:
            assert look.masks.flatten(1).mean(1).tolist() == pytest.approx(expected)
        assert line['gmacs'] != line['gmacs_dense']


@torch.no_grad()
def drawn(runner) -> list:
    """The samples of a batch, as pictures are drawn from them."""
    batch = next(iter(runner.build_dataloader(runner.cfg.test_dataloader)))
    with Collector(runner.model) as collector:
        return collector.take(batch, runner.model.test_step(batch))


def test_pictures_of_dispatch_among_fewer_tokens_have_costs_that_add_up(runner_of):
    for sample in drawn(runner_of('dyt+tome', r=1)):
        costed = zip(sample.rates(), sample.costs, strict=True)
        macs = sum(np.interp(rate, *zip(*cost.points, strict=True)) for rate, cost in costed)
        assert sample.gmacs == pytest.approx(sample.gmacs_rest + macs / 1e9) and sample.costs


def test_pictures_can_be_drawn(runner_of):
    for sample in drawn(runner_of('tome', r=1)):
        assert sample.logits is None and sample.costs == [] and sample.gmacs_rest == sample.gmacs
        assert sample.masks.min() > 0 and sample.masks.max() <= 1


def test_dispatch_among_fewer_tokens_has_the_rate_that_it_decides(runner_of):
    runner = runner_of('dyt+tome', r=1)
    for layer in runner.model.backbone.layers:
        layer.dynamic['mlp'].dispatcher.set_rule(capacity=0.5)
    batch = next(iter(runner.build_dataloader(runner.cfg.test_dataloader)))
    with torch.no_grad(), CostCounter(runner.model) as counter, MapRecorder(runner.model) as recorder:
        counter.add_samples(runner.model.test_step(batch))
        maps = recorder.take()
    for line, found in zip(counter.take().lines(), maps, strict=True):
        left, expected = found.looks[0].masks[0, 0].numel(), []
        for layer in runner.model.backbone.layers:
            left = layer.patches_after(left, 1)
            expected.append(round(0.5 * left) / left)
        assert list(line['rates'].values()) == pytest.approx(expected)
        assert all(look.masks.shape[0] == len(expected) for look in found.looks)
