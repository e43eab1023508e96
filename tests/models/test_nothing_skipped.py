"""Inference with gradients skips nothing, and a model says so once."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from test_calibrated_vit import ARCH

from mmdyt.core.branch import NothingSkippedWarning
from mmdyt.core.fit.evidence import fit_dispatchers
from mmdyt.core.observe import complete_model
from mmdyt.models import DyTVisionTransformer

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(**vit) -> DyTVisionTransformer:
    torch.manual_seed(0)
    return DyTVisionTransformer(ARCH, img_size=32, patch_size=8, **vit).eval()


def warned(run, *args) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        run(*args)
    return [str(w.message) for w in caught if w.category is NothingSkippedWarning]


@pytest.mark.parametrize('dispatch', ['mlp', 'attn', 'attn_mlp', 'layer'])
def test_each_model_says_once_that_no_token_was_skipped_and_how_to_silence_it(dispatch):
    for _ in range(2):
        model = build(dispatch=dispatch)
        (message,) = warned(lambda model=model: [model(IMAGES) for _ in range(3)])
        assert message.startswith('torch.no_grad() must be around the inference of a dispatched model, got one with')
        assert "simplefilter('ignore', mmdyt.core.branch.NothingSkippedWarning)" in message
        assert warned(model, IMAGES) == []


@pytest.mark.parametrize(
    ('vit', 'context'),
    [
        ({}, torch.no_grad),
        ({}, torch.inference_mode),
        (dict(inference='masked'), nullcontext),  # asked to compute all
        (dict(dispatcher=None), nullcontext),
        ({}, None),
    ],
)
def test_where_nothing_would_have_been_skipped_either_nothing_is_said(vit, context):
    model = build(**vit)
    with context() if context else complete_model(model):
        assert warned(model, IMAGES) == []


def test_training_and_fitting_say_nothing():
    model = build(dispatcher=dict(noise=False, fitted=True))
    assert warned(model.train(), IMAGES) == []
    assert warned(fit_dispatchers, model.eval(), [lambda: model(IMAGES)[-1].square().sum()]) == []


def test_a_filter_silences_it():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.simplefilter('ignore', NothingSkippedWarning)
        build()(IMAGES)
