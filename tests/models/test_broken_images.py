"""An image of NaN has NaN scores whichever executor runs, and leaves the other images of its batch as they were."""

import copy

import pytest
import torch
import torch.nn as nn
from conftest import TINY_ARCH
from mmengine.registry import MODELS, DefaultScope

import mmdyt.models.classifier  # noqa: F401  repairs the wheels, registers
from mmdyt.core.observe import dynamic_branches, random_masks

NAN, INF = float('nan'), float('inf')
CLASSIFIER = dict(
    type='mmdyt.DyTImageClassifier',
    target_rate=0.3,
    data_preprocessor=dict(type='mmdyt.ImagePreprocessor', num_classes=3),
    head=dict(type='VisionTransformerClsHead', num_classes=3, in_channels=TINY_ARCH['embed_dims']),
)
RANDOM = dict(type='mmdyt.RandomDispatcher', rate=0.3)


def build(dispatcher=None, capacity: float | None = None, **backbone) -> nn.Module:
    vit = dict(type='mmdyt.DyTVisionTransformer', arch=dict(TINY_ARCH, num_layers=2), img_size=32, patch_size=8)
    vit |= dict(adapter=dict(bottleneck=4), dispatcher=copy.deepcopy(dispatcher) or {}, **backbone)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(CLASSIFIER | dict(backbone=vit))
    for branch in dynamic_branches(model).values():
        if dispatcher != RANDOM:
            nn.init.normal_(branch.dispatcher.gate.weight)
        if capacity is not None:
            branch.dispatcher.set_rule(capacity=capacity)
    return model


def scores(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)  # where masks are drawn, the same ones
    return model.head(model.extract_feat(images))


def broken(value: float, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Three images, and the same with the second one broken."""
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    spoilt = images.clone()
    spoilt[1][..., :8, :8] = value
    if where == 'everywhere':
        spoilt[1] = value
    return images, spoilt


@pytest.mark.parametrize('dispatch', ['mlp', 'attn', 'attn_mlp', 'layer'])
@pytest.mark.parametrize('inference', ['auto', 'packed', 'masked'])
@pytest.mark.parametrize(
    ('dispatcher', 'options'),
    [
        (None, {}),
        (None, dict(capacity=0.5)),
        (None, dict(capacity=0.0)),
        (None, dict(skip_unread=True)),
        (dict(type='mmdyt.SampleDispatcher'), {}),
        (RANDOM, {}),
    ],
    ids=['threshold', 'capacity', 'no capacity', 'skip_unread', 'sample', 'random'],
)
def test_broken_images_have_nan_scores_and_leave_the_others_alone(dispatch, inference, dispatcher, options):
    model = build(dispatcher, dispatch=dispatch, inference=inference, **options).eval()
    for value, where in ((NAN, 'everywhere'), (NAN, 'in a corner'), (INF, 'everywhere')):
        images, spoilt = broken(value, where)
        with torch.no_grad():
            sound, found = scores(model, images), scores(model, spoilt)
        assert found[1].isnan().all()
        torch.testing.assert_close(found[[0, 2]], sound[[0, 2]], rtol=0, atol=1e-6)


@pytest.mark.parametrize('dispatch', ['mlp', 'attn', 'attn_mlp', 'layer'])
@pytest.mark.parametrize('training', ['masked', 'split'])
@pytest.mark.parametrize('options', [dict(noise=True), dict(noise=False), dict(noise=False, fitted=True)], ids=str)
def test_broken_images_have_nan_scores_in_training_too(dispatch, training, options):
    model = build(options, dispatch=dispatch, training=training)
    images, spoilt = broken(NAN, 'everywhere')
    model.eval()
    with torch.enable_grad():  # saliency maps
        assert scores(model, spoilt)[1].isnan().all()
    model.train()
    sound, found = scores(model, images), scores(model, spoilt)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2]], sound[[0, 2]], rtol=0, atol=1e-6)


@pytest.mark.parametrize('dispatch', ['attn', 'layer'])
def test_broken_images_have_nan_scores_whatever_a_rule_decides(dispatch):
    model = build(dispatch=dispatch).eval()
    with torch.no_grad(), random_masks(model, dict.fromkeys(dynamic_branches(model), 0.0)):
        found = scores(model, broken(NAN, 'everywhere')[1])
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()
