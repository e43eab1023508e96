"""mmseg's losses on ignored pixels, one output channel, class weights and the CPU: what compat mends."""

import sys

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS

from mmdyt import compat

compat.install()

pytest.importorskip('mmseg.models')

from mmengine.structures import PixelData  # noqa: E402
from mmseg.structures import SegDataSample  # noqa: E402

C, WEIGHTS = 4, [1.0, 2.0, 3.0, 4.0]
CE = dict(type='mmseg.CrossEntropyLoss')
BCE, WEIGHTED = CE | dict(use_sigmoid=True), CE | dict(class_weight=WEIGHTS)
DICE, FOCAL = dict(type='mmseg.DiceLoss'), dict(type='mmseg.FocalLoss')
LOVASZ, TVERSKY = dict(type='mmseg.LovaszLoss', reduction='none'), dict(type='mmseg.TverskyLoss')
BY_IMAGE = dict(type='mmseg.LovaszLoss', per_image=True)
HINGE = LOVASZ | dict(loss_type='binary')
LOSSES = [  # and channels
    (CE, C),
    (CE | dict(avg_non_ignore=True), C),
    (WEIGHTED, C),
    (WEIGHTED | dict(avg_non_ignore=True), C),
    (BCE, C),
    (BCE | dict(class_weight=WEIGHTS), C),
    (BCE, 1),
    (BCE | dict(avg_non_ignore=True), 1),
    (DICE, C),
    (DICE | dict(use_sigmoid=False), C),
    (DICE | dict(naive_dice=True), C),
    (DICE, 1),
    (FOCAL, C),
    (FOCAL | dict(class_weight=WEIGHTS, alpha=[0.5] * C), C),
    (FOCAL, 1),
    (LOVASZ, C),
    (LOVASZ | dict(class_weight=WEIGHTS), C),
    (BY_IMAGE, C),
    (HINGE, 1),
    (TVERSKY, C),
]


def loss_of(cfg: dict, logits: torch.Tensor, labels: torch.Tensor, **options) -> torch.Tensor:
    return MODELS.build(cfg)(logits, labels, ignore_index=255, **options)


def random_batch(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, channels, 6, C, generator=generator).requires_grad_(True)
    return logits, torch.randint(max(channels, 2), (2, 6, C), generator=generator)


@pytest.mark.parametrize('ignored', [slice(0, 0), slice(0, 2), slice(None)], ids=['none', 'some', 'all'])
@pytest.mark.parametrize(('cfg', 'channels'), LOSSES)
def test_ignored_pixels_neither_break_a_loss_nor_change_it(cfg, channels, ignored):
    """Whatever a model says about them: the loss is finite and the same, and they have no gradient."""
    logits, labels = random_batch(channels)
    labels[:, ignored] = 255
    loss = loss_of(cfg, logits, labels)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    assert not logits.grad[:, :, ignored].any()
    other = logits.detach().clone()
    other[:, :, ignored] += 3
    torch.testing.assert_close(loss_of(cfg, other, labels), loss.detach())


@pytest.mark.parametrize('cfg', [CE, BCE, CE | dict(avg_non_ignore=True), BCE | dict(avg_non_ignore=True), FOCAL])
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_class_weights_of_one_change_nothing(cfg, reduction):
    logits, labels = random_batch(C)  # as wide as there are classes
    labels[:, :2] = 255
    plain, weighted = (
        loss_of(cfg | more, logits, labels, reduction_override=reduction) for more in ({}, dict(class_weight=[1.0] * C))
    )
    torch.testing.assert_close(weighted, plain)


def test_weighted_cross_entropy_of_labelled_pixels_is_that_of_torch():
    logits, labels = random_batch(C)
    labels[:, :2] = 255
    expected = F.cross_entropy(logits, labels, torch.tensor(WEIGHTS), ignore_index=255)
    torch.testing.assert_close(loss_of(WEIGHTED | dict(avg_non_ignore=True), logits, labels), expected)


def test_an_ignored_class_with_a_weight_is_left_to_the_host():
    logits, labels = random_batch(C)
    found = MODELS.build(WEIGHTED)(logits, labels, ignore_index=1)
    pixels = F.cross_entropy(logits, labels, torch.tensor(WEIGHTS), ignore_index=1, reduction='sum')
    torch.testing.assert_close(found, pixels / torch.tensor(WEIGHTS)[labels].sum())


def test_sigmoid_weights_belong_to_classes_and_not_to_columns():
    logits, labels = random_batch(C)
    one_hot = F.one_hot(labels, C).movedim(-1, 1).float()
    weights = torch.tensor(WEIGHTS).view(-1, 1, 1)
    expected = F.binary_cross_entropy_with_logits(logits, one_hot, pos_weight=weights)
    torch.testing.assert_close(loss_of(BCE | dict(class_weight=WEIGHTS), logits, labels), expected)


@pytest.mark.parametrize('cfg', [BCE, DICE, FOCAL, HINGE])
def test_one_channel_is_the_foreground(cfg):
    """Label 1, in every loss: what one calls right another must not call wrong."""
    _, labels = random_batch(1)
    right = (labels.float() * 40 - 20).unsqueeze(1)
    assert loss_of(cfg, right, labels) < 0.01 < 0.5 < loss_of(cfg, -right, labels)


def test_focal_loss_on_the_cpu_is_its_formula():
    logits, labels = random_batch(C)
    one_hot = F.one_hot(labels, C).movedim(-1, 1).float()
    p = logits.sigmoid() * one_hot + (1 - logits.sigmoid()) * (1 - one_hot)
    torch.testing.assert_close(loss_of(FOCAL, logits, labels), (-0.5 * (1 - p) ** 2 * p.log()).mean())


def test_lovasz_loss_of_one_labelled_pixel_is_that_of_the_pixel():
    logits, labels = random_batch(C)
    labels[:, :, :] = 255
    labels[0, 0, 0] = 2
    expected = 1 - logits[0, :, 0, 0].softmax(0)[2]  # one class is present, and it is a single error
    torch.testing.assert_close(loss_of(LOVASZ, logits, labels), expected)


@pytest.mark.parametrize('channels', [1, C])
def test_accuracy_is_the_share_of_right_pixels(channels):
    from mmseg.models.decode_heads.decode_head import accuracy  # where heads look for it

    logits, labels = random_batch(channels)
    labels[:, :2] = 255
    predicted = (logits > 0).squeeze(1).long() if channels == 1 else logits.argmax(1)
    share = (predicted == labels)[:, 2:].float().mean() * 100
    torch.testing.assert_close(accuracy(logits, labels, ignore_index=255), share.view(1), rtol=1e-4, atol=1e-4)


def test_a_model_trains_with_class_weights_on_images_with_unlabelled_pixels(tiny_model_cfg):
    """As on CamVid, whose unlabelled pixels are 255."""
    loss = dict(type='CrossEntropyLoss', class_weight=[1.0, 2.0, 0.5], avg_non_ignore=True)
    tiny_model_cfg.decode_head.loss_decode = loss
    tiny_model_cfg.auxiliary_head.loss_decode = loss
    model = MODELS.build(tiny_model_cfg)
    labels = torch.randint(3, (1, 64, 64))
    labels[:, :20] = 255
    samples = [SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=dict(img_shape=(64, 64))) for _ in range(2)]
    losses = model.loss(torch.randn(2, 3, 64, 64), samples)
    assert all(torch.as_tensor(value).isfinite().all() for value in losses.values())


def test_a_host_that_is_right_is_left_alone():
    """The repaired modules are such hosts: repairing them again puts nothing over what is there."""
    names = [f'mmseg.models.losses.{name}_loss' for name in ('cross_entropy', 'dice', 'focal', 'lovasz')]
    modules = [sys.modules[name] for name in (*names, 'mmseg.models.losses.accuracy')]
    before = [dict(vars(module)) for module in modules]
    forward = sys.modules['mmseg.models.losses.focal_loss'].FocalLoss.forward
    compat.install()
    assert [dict(vars(module)) for module in modules] == before
    assert sys.modules['mmseg.models.losses.focal_loss'].FocalLoss.forward is forward
