"""Where tokens halt: rates, maps and costs of samples, in three hosts."""

import pytest
import torch
import torch.nn as nn
from test_maps_of_fewer_tokens import drawn, runner_of  # noqa: F401  a fixture

from mmdyt.core.grid import on_grid
from mmdyt.core.observe import dynamic_branches, record_dispatch
from mmdyt.engine.costs import CostCounter
from mmdyt.engine.flops import _wanted
from mmdyt.engine.maps import MapRecorder


def halting(runner):
    """The runner, with gates that halt some tokens early and others late."""
    torch.manual_seed(0)
    for branch in dynamic_branches(runner.model).values():
        if branch.dispatcher.gate is not None:
            nn.init.normal_(branch.dispatcher.gate.weight)
            nn.init.constant_(branch.dispatcher.gate.bias, 0.0)
    return runner


@torch.no_grad()
def test_rates_maps_and_costs_are_those_of_the_masks(runner_of):  # noqa: F811
    runner = halting(runner_of('avit', eps=0.4))
    batch = next(iter(runner.build_dataloader(runner.cfg.test_dataloader)))
    with CostCounter(runner.model) as counter, MapRecorder(runner.model) as recorder:
        with record_dispatch(runner.model) as record:
            counter.add_samples(runner.model.test_step(batch))
        maps = recorder.take()
    lines, passes = counter.take().lines(), len(record.dispatches[record.names[0]])
    assert len(lines) == len(maps)
    grids = [on_grid(list(record.of_pass(i).values()), maps[0].looks[0].masks.shape[-2:]) for i in range(passes)]
    masks = torch.stack(grids)
    assert (masks[:, 1:] <= masks[:, :-1]).all() and masks[:, 0].all() and masks[:, -1].mean() < 0.95
    for line, found in zip(lines, maps, strict=True):
        looked = torch.stack([look.masks for look in found.looks])  # (looks, L, T, rows, columns)
        assert (looked[:, 1:] <= looked[:, :-1]).all()
        assert list(line['rates'].values()) == pytest.approx(looked.mean((0, 2, 3, 4)).tolist())
    assert sum(line['activation_rate'] for line in lines) / len(lines) == pytest.approx(masks.mean().item())
    for branch in list(dynamic_branches(runner.model).values())[1:]:
        nn.init.constant_(branch.dispatcher.gate.bias, -1000.0)
    with CostCounter(runner.model) as counter:
        counter.add_samples(runner.model.test_step(batch))
    for line, whole in zip(lines, counter.take().lines(), strict=True):
        assert whole['activation_rate'] == 1 and line['gmacs_backbone'] < whole['gmacs_backbone']


def test_pictures_can_be_drawn(runner_of):  # noqa: F811
    for sample in drawn(halting(runner_of('avit', eps=0.4))):
        assert sample.logits is None and 0 < sample.masks.mean() < 1


def test_no_rate_is_called_wanted_that_nothing_follows(runner_of):  # noqa: F811
    assert _wanted(runner_of('avit').model) is None and _wanted(runner_of('dyt').model) == 0.5
