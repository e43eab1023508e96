"""Backbones whose tokens decide in cells: every executor, odd grids, prompts, clips."""

import pytest
import torch
from mmengine.registry import MODELS

import mmdyt.models.vit  # noqa: F401  registers
from mmdyt.core.fit.calibrate import calibrate
from mmdyt.core.fit.request import CalibrationRequest
from mmdyt.core.observe import dynamic_branches, record_dispatch

ARCH = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64)


def build(dispatch='mlp', keys='active', **options):
    torch.manual_seed(0)
    cell = {name: options.pop(name) for name in ('cell', 'frames') if name in options}
    vit = dict(type='mmdyt.DyTVisionTransformer', arch=ARCH, img_size=32, patch_size=8, out_type='featmap')
    dispatcher = dict(type='mmdyt.CellDispatcher', **cell)
    model = MODELS.build(vit | dict(dispatch=dispatch, keys=keys, dispatcher=dispatcher) | options).eval()
    for branch in dynamic_branches(model).values():
        torch.nn.init.normal_(branch.dispatcher.gate.weight)
        torch.nn.init.normal_(branch.adapter.up.weight, std=0.1)
    return model


def run(model, x):
    with torch.no_grad(), record_dispatch(model) as record:
        (features,) = model(x)
    return features, record.flat()


@pytest.mark.parametrize('rule', [dict(threshold=0.1), dict(capacity=0.5)], ids=['threshold', 'capacity'])
@pytest.mark.parametrize('size', [(32, 48), (40, 24)])
@pytest.mark.parametrize(
    ('dispatch', 'keys'),
    [('mlp', 'active'), ('attn_mlp', 'active'), ('attn_mlp', 'all'), ('layer', 'active'), ('layer', 'all')],
)
def test_what_skips_gives_what_masked_gives(dispatch, keys, size, rule):
    model, x = build(dispatch, keys), torch.randn(3, 3, *size)
    for branch in dynamic_branches(model).values():
        branch.dispatcher.set_rule(**rule)
    skipping, dispatches = run(model, x)
    for branch in dynamic_branches(model).values():
        branch.inference = 'masked'
    masked, _ = run(model, x)
    torch.testing.assert_close(skipping, masked, rtol=0, atol=1e-5 * masked.abs().max().item())
    assert any(0 < d.patch_mask.mean() < 1 for d in dispatches)
    rows, columns = size[0] // 8, size[1] // 8
    for d in dispatches:
        maps = d.patch_mask.view(3, rows, columns)[:, : rows // 2 * 2, : columns // 2 * 2]
        cells = maps.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        assert torch.equal(cells.amin(dim=(2, 4)), cells.amax(dim=(2, 4)))


@pytest.mark.parametrize('per_image', [False, True])
def test_calibration_meets_its_rate_by_whole_cells(per_image):
    model, x = build(), torch.randn(8, 3, 64, 64)
    calibrate(model, [lambda: model(x)], CalibrationRequest(0.5, 'uniform', per_image))
    _, dispatches = run(model, x)
    assert sum(d.patch_mask.mean().item() for d in dispatches) / len(dispatches) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(('dispatch', 'keys'), [('mlp', 'active'), ('attn_mlp', 'active'), ('layer', 'all')])
def test_cells_work_where_nothing_reads_the_last_patches(dispatch, keys):
    x = torch.randn(2, 3, 32, 32)
    whole, less = (build(dispatch, keys, skip_unread=skip, out_type='cls_token') for skip in (False, True))
    torch.testing.assert_close(run(less, x)[0], run(whole, x)[0], rtol=0, atol=1e-5)
    less.train()(x)


def test_prompts_and_clips_have_cells_of_patches_only():
    parts = [dict(type='mmdyt.Prompts', length=3)]
    model = build(parts=parts, frames=2)
    clips = torch.randn(2, 3, 4, 32, 32)
    _, dispatches = run(model, clips)
    for d in dispatches:
        masks = d.patch_mask.view(4, 2, 16)
        assert torch.equal(masks[:, 0], masks[:, 1])
        assert d.num_prefix_tokens == 4 and d.mask[:, :4].all()
