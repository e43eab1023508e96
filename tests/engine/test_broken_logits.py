"""Logits that are no numbers give no rate: FLOPsHook says whose they were, and what stays."""

import logging
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from mmengine.registry import MODELS
from mmseg.structures import SegDataSample

from mmdyt.core.observe import complete_model, dynamic_branches
from mmdyt.engine.costs import Costs
from mmdyt.engine.flops import FLOPsHook
from mmdyt.engine.own_images import of_each
from mmdyt.engine.random_masks import RandomMasksHook

NAN, INF = float('nan'), float('inf')
SLIDE = dict(mode='slide', crop_size=(64, 64), stride=(32, 32))
DENSE = {'gmacs_dense', 'gmacs_backbone_dense', 'gmacs_neck', 'gmacs_head'}


@pytest.mark.parametrize(
    ('passes', 'samples', 'expected'),
    [
        ([[0, 1, 0]], 'abc', 'b'),
        ([[0, 1, 0], [0, 1, 1]], 'abc', 'bc'),  # layers or windows
        ([[0, 0, 0, 1, 0, 0]], 'abc', 'b'),  # two views or frames of each
        ([[1, 1]], 'a', 'a'),
        ([[0, 0]], 'ab', ''),
        ([[0] * 48 + [1]], [str(i) for i in range(49)], ['48']),
    ],
)
def test_samples_are_found_by_their_place(passes, samples, expected):
    rows = [torch.tensor([images]) for images in passes]
    broken = sum(of_each(row, len(samples)) for row in rows)[0].numpy()
    names = {'layers.0.dynamic.mlp': 'layer_0'}
    rows = {f'{kind}/layers.0.dynamic.mlp': broken for kind in ('active', 'seen', 'broken')}
    assert Costs(list(samples), names, rows).broken() == (list(expected), ['layer_0'] if expected else [])


@pytest.fixture
def evaluate(tiny_model_cfg, caplog):
    """``evaluate(images, gate, test_cfg)`` lets the hook see a test of a tiny segmentor; returns metrics and log."""

    def run(images, gate: float | None = None, context=None, **options) -> tuple[dict, str]:
        torch.manual_seed(0)
        model = MODELS.build(tiny_model_cfg | options).eval()
        for branch in dynamic_branches(model).values():
            nn.init.normal_(branch.dispatcher.gate.weight)
        if gate is not None:
            model.backbone.layers[2].dynamic['mlp'].dispatcher.gate.bias.data.fill_(gate)
        hub = SimpleNamespace(update_scalar=lambda name, value: None)
        runner = SimpleNamespace(model=model, logger=logging.getLogger('flops'), message_hub=hub)
        hook, metrics = FLOPsHook(lines=False), {}
        caplog.set_level('INFO')
        hook.before_test_epoch(runner)
        for i, image in enumerate(images):
            samples = [SegDataSample(metainfo=dict(img_path=f'{i}{j}.png')) for j in range(len(image))]
            with torch.no_grad(), context(model) if context else torch.no_grad():
                model.predict(image)
            hook.after_test_iter(runner, i, outputs=samples)
        hook.after_test_epoch(runner, metrics)
        return metrics, [text for text in caplog.messages if not text.startswith('GMACs of single samples')][-1]

    return run


def images(broken: float | None = None) -> list[torch.Tensor]:
    """Two batches of images; in the second one the last may be broken, to the right."""
    found = [torch.randn(2, 3, 64, 96), torch.randn(3, 3, 64, 96)]
    if broken is not None:
        found[1][2, :, :, 70:] = broken
    return found


@pytest.mark.parametrize('options', [{}, dict(test_cfg=SLIDE)], ids=['whole', 'slide'])
@pytest.mark.parametrize('value', [NAN, INF, -INF])
def test_a_broken_image_is_named_and_no_rate_is_reported(evaluate, value, options):
    metrics, message = evaluate(images(value), **options)
    assert metrics.keys() == DENSE
    layers = 'layer_0, layer_1, layer_2, layer_3'
    assert re.match(
        rf'No activation rate and no GMACs: logits of {layers} are NaN or infinite for 1 sample, 12\.png\. Dense: \d',
        message,
    )


@pytest.mark.parametrize('gate', [NAN, INF, -INF])
def test_a_broken_layer_is_named(evaluate, gate):
    metrics, message = evaluate(images(), gate)
    assert metrics.keys() == DENSE
    assert 'logits of layer_2 are NaN or infinite for 5 samples, 00.png, 01.png, 10.png and 2 more.' in message


def test_sound_logits_are_reported_as_ever(evaluate):
    metrics, message = evaluate(images())
    assert 0 < metrics['activation_rate'] < 1 and 'gmacs' in metrics and message.startswith('Activation rate 0.')


def test_the_complete_model_has_no_logits_to_be_broken(evaluate):
    metrics, _ = evaluate(images(NAN), context=complete_model)
    assert metrics['activation_rate'] == 1


def test_there_is_no_second_pass_with_random_masks_where_there_is_no_rate(tiny_model_cfg, caplog):
    runner = SimpleNamespace(model=MODELS.build(tiny_model_cfg), logger=logging.getLogger('random'))
    metrics = dict(mIoU=1.0)
    RandomMasksHook()._repeat(runner, SimpleNamespace(dataloader=None), metrics, 'test')
    assert metrics == dict(mIoU=1.0) and caplog.messages == ['No second pass with random masks: no rate was measured.']
