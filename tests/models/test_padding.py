"""Tokens in padding are never dispatched, and count in no rate and no cost."""

import copy
import math
from functools import partial
from threading import Thread

import pytest
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData

import mmdyt.models.classifier  # noqa: F401
import mmdyt.models.segmentor  # noqa: F401  repairs the wheels before mmseg is imported
from mmdyt.core.fit import evidence
from mmdyt.core.fit.calibrate import calibrate, measured_rates, token_dispatchers
from mmdyt.core.fit.mean_update import fit_mean_updates
from mmdyt.core.fit.request import CalibrationRequest
from mmdyt.core.observe import complete_model, dynamic_branches, record_dispatch, watch_updates
from mmdyt.core.padding import VIEWS
from mmdyt.engine.costs import CostCounter

# isort: split
from mmpretrain.registry import MODELS as PRETRAIN
from mmpretrain.structures import DataSample
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

SIZES = [(64, 64), (48, 33), (16, 64)]
# patch tokens of 16 pixels that show some of the image, of 16
SHOWN = [16, 9, 4]


@pytest.fixture
def cfg(tiny_config):
    cfg = Config.fromfile(tiny_config, import_custom_modules=False)
    cfg.model.backbone.init_cfg = None
    init_default_scope('mmseg')
    return cfg


def build(cfg, **backbone):
    torch.manual_seed(0)
    cfg = copy.deepcopy(cfg)
    for name in set(cfg.model.backbone) & set(backbone):
        del cfg.model.backbone[name]
    cfg.model.backbone.update(backbone)
    model = MODELS.build(cfg.model)
    for branch in dynamic_branches(model).values():
        nn.init.normal_(branch.adapter.up.weight, std=0.1)
        if hasattr(branch.dispatcher, 'gate'):
            nn.init.normal_(branch.dispatcher.gate.weight)
    return model


def data(sizes=SIZES):
    torch.manual_seed(1)
    inputs = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    meta = [dict(ori_shape=size, img_shape=size, img_path='x.png') for size in sizes]
    labels = [PixelData(data=torch.randint(0, 3, (1, *size))) for size in sizes]
    samples = [SegDataSample(gt_sem_seg=label, metainfo=m) for label, m in zip(labels, meta, strict=True)]
    return dict(inputs=inputs, data_samples=samples)


def run(model, mode, sizes=SIZES, pads=True):
    # mmseg pads images of several sizes as in training, and refuses them in a test
    batch = model.data_preprocessor(data(sizes), len(sizes) > 1) if pads else data(sizes)
    if not pads:
        batch = model.data_preprocessor(batch, False)
    return model(**batch, mode=mode)


def padded():
    """(B, M): by brute force over pixels."""
    found = []
    for height, width in SIZES:
        pixels = torch.zeros(64, 64, dtype=torch.bool)
        pixels[:height, :width] = True
        found.append(~pixels.view(4, 16, 4, 16).permute(0, 2, 1, 3).flatten(2).any(-1).flatten())
    return torch.stack(found)


VARIANTS = [
    dict(),
    dict(dispatch='layer'),
    dict(dispatch='layer', keys='all'),
    dict(dispatch='attn_mlp'),
    dict(inference='masked'),
    dict(inference='fixed'),
    dict(dispatcher=dict(type='mmdyt.SampleDispatcher')),
    dict(dispatcher=dict(type='mmdyt.CellDispatcher', cell=(2, 2))),
    dict(dispatcher=dict(type='mmdyt.RandomDispatcher')),
    dict(decide_per='level', dispatch='layer', keys='all'),
]


@pytest.mark.parametrize('mode', ['loss', 'predict'])
@pytest.mark.parametrize('options', VARIANTS, ids=str)
def test_padding_is_never_active_and_in_no_rate(cfg, options, mode):
    model = build(cfg, **options).train(mode == 'loss')
    if options.get('inference') == 'fixed':
        for dispatcher in token_dispatchers(model).values():
            dispatcher.set_rule(capacity=0.5)
    with torch.set_grad_enabled(mode == 'loss'), record_dispatch(model) as record:
        result = run(model, mode)
    hidden = padded()
    for dispatch in record.flat():
        assert not dispatch.patch_mask[hidden].any() and torch.equal(dispatch.padding.squeeze(-1), hidden)
    active = torch.stack([d.patch_mask[~hidden] for d in record.flat()])
    assert 0 < active.mean() < 1
    if mode == 'loss':
        torch.testing.assert_close(result['activation_rate'], active.mean())
    for runs in record.runs.values():
        assert torch.as_tensor(runs[0].padding).tolist() == [16 - shown for shown in SHOWN]


def test_a_share_of_each_image_is_one_of_the_tokens_that_count(cfg):
    model = build(cfg, inference='fixed').eval()
    for dispatcher in token_dispatchers(model).values():
        dispatcher.set_rule(capacity=0.5)
    with torch.no_grad(), record_dispatch(model) as record:
        run(model, 'predict')
        alone = len(record.flat())
        run(model, 'predict', SIZES[:1])
    for dispatch in record.flat()[0::2]:
        assert dispatch.patch_mask.sum((1, 2)).tolist() == [8, 4, 2]
    runs = [passes[:2] for name, passes in record.runs.items() if name in record.names]
    assert {one.executor for one, _ in runs} == {'packed'} and {one.executor for _, one in runs} == {'fixed'}
    assert alone == 4


@pytest.mark.parametrize('mode', ['loss', 'predict'])
def test_a_classifier_whose_preprocessor_pads_tells_its_backbone(mode):
    """mmpretrain's pads images to a multiple, and notes nothing of it."""
    init_default_scope('mmpretrain')
    arch = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
    model = PRETRAIN.build(
        dict(
            type='mmdyt.DyTImageClassifier',
            data_preprocessor=dict(type='ClsDataPreprocessor', pad_size_divisor=64),
            backbone=dict(type='mmdyt.DyTVisionTransformer', arch=arch, img_size=64, patch_size=16),
            head=dict(type='VisionTransformerClsHead', num_classes=3, in_channels=16),
        )
    ).train(mode == 'loss')
    samples = [DataSample(metainfo=dict(img_shape=size)).set_gt_label(1) for size in SIZES]
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in SIZES]
    batch = model.data_preprocessor(dict(inputs=images, data_samples=samples), mode == 'loss')
    assert batch['inputs'].shape == (3, 3, 64, 64)
    with record_dispatch(model) as record:
        model(**batch, mode=mode)
    for dispatch in record.flat():
        assert torch.equal(dispatch.padding.squeeze(-1), padded())
        assert dispatch.complete or not dispatch.patch_mask[padded()].any()  # the complete pass has no mask


@pytest.mark.parametrize('threshold', [-math.inf, math.inf])
@pytest.mark.parametrize('options', [dict(), dict(dispatch='layer', keys='all'), dict(dispatcher=None)], ids=str)
def test_an_image_costs_what_it_costs_without_padding(cfg, options, threshold):
    sizes = [(64, 64), (48, 32), (32, 64)]  # whole patches
    costs = {}
    for padding in (True, False):
        model = build(cfg, **options).eval()
        for dispatcher in token_dispatchers(model).values() if dynamic_branches(model) else ():
            dispatcher.set_rule(threshold)
        found = []
        with torch.no_grad(), CostCounter(model) as counter:
            for some in [sizes] if padding else [[size] for size in sizes]:
                run(model, 'predict', some, padding)
                counter.add_images(len(some))
                lines = counter.take().lines()
                found += [(line['gmacs_backbone'], line['rates']) for line in lines]
        costs[padding] = found
    assert costs[True] == costs[False]


def test_windows_in_padding(cfg):
    found = []
    for at_once in (1, 3):
        model = build(cfg).eval()
        model.test_cfg.update(mode='slide', crop_size=(32, 32), stride=(16, 16), windows_per_pass=at_once)
        with torch.no_grad(), record_dispatch(model) as record, CostCounter(model) as counter:
            run(model, 'predict')
            counter.add_images(3)
        passes = record.dispatches[record.names[0]]
        rows = torch.cat([d.patch_mask.unflatten(0, (3, -1)) for d in passes], dim=1)  # (image, window, M, 1)
        assert len(rows[0]) == 9 and not rows[2, 3:].any() and rows[0].any()  # 16 rows of pixels: first row of windows
        found.append((rows, counter.costs().lines()))
    assert torch.equal(found[0][0], found[1][0])
    assert [line['rates'] for line in found[0][1]] == [line['rates'] for line in found[1][1]]


def test_thresholds_evidence_and_mean_updates_are_those_of_tokens_that_count(cfg, monkeypatch):
    model = build(cfg, dispatcher=dict(noise=False, fitted=True), substitute=dict(type='mmdyt.MeanUpdate'))
    forwards = [partial(run, model, 'predict')]
    calibrate(model, forwards, CalibrationRequest(0.5, 'uniform'))
    assert all(abs(rate - 0.5) < 0.02 for rate in measured_rates(model, forwards).values())  # of 29 tokens

    updates = {}
    with torch.no_grad(), complete_model(model.eval()), watch_updates(model, updates.__setitem__):
        forwards[0]()
    fit_mean_updates(model, forwards)
    for name, branch in dynamic_branches(model).items():
        expected = updates[name][:, 1:][~padded()].mean(0)
        torch.testing.assert_close(branch.deltas('inactive')[0].value, expected)

    counts, add = [], evidence.Moments.add
    monkeypatch.setattr(evidence.Moments, 'add', lambda self, x, y: counts.append(len(x)) or add(self, x, y))
    evidence.fit_dispatchers(model, [lambda: run(model, 'loss')['decode.loss_ce']])
    assert counts == [sum(SHOWN)] * 4


@pytest.mark.parametrize('kind', ['SampleDispatcher', 'CellDispatcher', 'TokenDispatcher'])
def test_a_window_of_nothing_but_padding_decides_nothing_and_breaks_nothing(cfg, kind):
    model = build(cfg, dispatcher=dict(type=f'mmdyt.{kind}')).eval()
    model.test_cfg.update(mode='slide', crop_size=(32, 32), stride=(32, 32))
    with torch.no_grad(), CostCounter(model) as counter:
        run(model, 'predict')  # the last image ends above the second row of windows
        counter.add_images(3)
    assert counter.costs().broken() == ([], [])


def test_nothing_is_known_of_stock_passes_other_threads_and_whole_batches(cfg):
    model = build(cfg).eval()
    seen = []

    def look(*args):
        thread = Thread(target=lambda: seen.append(VIEWS.get()))
        thread.start()
        thread.join()

    before = model.backbone.register_forward_pre_hook(look)
    with torch.no_grad(), record_dispatch(model) as record:
        run(model, 'predict')
        before.remove()
        model.backbone(torch.randn(3, 3, 64, 64))  # no host
        run(model, 'predict', [(64, 64)] * 3)
    assert seen == [None] and VIEWS.get() is None
    assert [d.padding is None for d in record.dispatches[record.names[0]]] == [False, True, True]
