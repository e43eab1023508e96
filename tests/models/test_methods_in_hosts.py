"""Every method in all three hosts: it trains in mixed precision, and stock heads get what they expect."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from test_methods import DECIDING, METHODS, arguments, learn
from test_recognizer import HEAD as CLIP_HEAD
from test_recognizer import NECK
from test_segmentor import samples as segmentation_samples
from test_vit import TINY

import mmdyt.models.classifier
import mmdyt.models.recognizer
import mmdyt.models.segmentor  # noqa: F401  registers
from mmdyt.core.observe import dynamic_branches

# isort: split
from mmaction.structures import ActionDataSample
from mmengine.registry import MODELS
from mmpretrain.structures import DataSample

SIZES = dict(type='mmdyt.DyTVisionTransformer', arch=TINY, img_size=32, patch_size=8)


def classifier(backbone):
    head = dict(type='VisionTransformerClsHead', num_classes=5, in_channels=32)
    return dict(type='mmdyt.DyTImageClassifier', backbone=SIZES | backbone, head=head), 'mmpretrain'


def recognizer(backbone):
    preprocessor = dict(type='ActionDataPreprocessor', format_shape='NCTHW')
    backbone = SIZES | backbone | dict(out_type='raw')
    return dict(
        type='mmdyt.DyTRecognizer', backbone=backbone, neck=NECK, cls_head=CLIP_HEAD, data_preprocessor=preprocessor
    ), 'mmaction'


@pytest.fixture
def build(tiny_config):
    """``build(host, method)``: the model and a batch for it."""

    def make(host, method):
        options = dict(adapter=None) if '+' in method and 'adapter+' not in method else {}
        backbone = arguments(method, **options)
        if host == 'segmentation':
            model = Config.fromfile(tiny_config, import_custom_modules=False).model
            for name in ('adapter', 'dispatcher', 'init_cfg'):
                model.backbone.pop(name)
            model.backbone.update(backbone)
            cfg, scope = model, 'mmseg'
            batch = torch.randn(2, 3, 64, 64), segmentation_samples()
        elif host == 'classification':
            cfg, scope = classifier(backbone)
            batch = torch.randn(2, 3, 32, 32), [DataSample().set_gt_label(i) for i in range(2)]
        else:
            cfg, scope = recognizer(backbone)
            batch = torch.randn(2, 1, 3, 2, 32, 32), [ActionDataSample().set_gt_label(i) for i in range(2)]
        torch.manual_seed(0)
        with DefaultScope.overwrite_default_scope(scope):
            model = MODELS.build(cfg)
            model.init_weights()
        learn(model.backbone)
        return model, batch

    return make


WITH_DISPATCH = [m if m in DECIDING else f'{m}+dyt' for m in METHODS]


@pytest.mark.parametrize('host', ['classification', 'segmentation', 'video'])
@pytest.mark.parametrize('method', sorted({*METHODS, *WITH_DISPATCH}))
def test_it_trains_in_mixed_precision_and_predicts(build, host, method):
    model, (inputs, samples) = build(host, method)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = model.train().loss(inputs, samples)
    loss, _ = model.parse_losses(losses)
    assert ('loss_rate' in losses) == bool(dynamic_branches(model))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        found = model.eval().predict(inputs, samples)
    if host == 'segmentation':
        assert all(sample.seg_logits.data.shape[1:] == (64, 64) for sample in found)
    else:
        assert all(sample.pred_score.shape == (5,) and sample.pred_score.isfinite().all() for sample in found)
