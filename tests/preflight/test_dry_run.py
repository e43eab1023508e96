"""One sample of each data set goes through the model: at what price."""

import pytest
import torch
from conftest import TINY_ARCH
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope

import mmdyt.models.segmentor  # noqa: F401  registers
from mmdyt.preflight.dry_run import windows_once

C = TINY_ARCH['embed_dims']
SEGMENTOR = dict(
    type='mmdyt.DyTEncoderDecoder',
    backbone=dict(
        type='mmdyt.DyTVisionTransformer', arch=dict(TINY_ARCH), img_size=32, patch_size=8, out_type='featmap'
    ),
    decode_head=dict(type='FCNHead', in_channels=C, in_index=0, channels=8, num_convs=1, num_classes=3),
)


def segmentor(counted: list, base: str = 'mmdyt.DyTEncoderDecoder', **test_cfg):
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(ConfigDict(SEGMENTOR | dict(type=base, test_cfg=test_cfg))).eval()
    model.backbone.register_forward_hook(lambda module, inputs, outputs: counted.append(inputs[0].shape))
    return model


def infer(model, height: int, width: int) -> torch.Tensor:
    metas = [dict(img_shape=(height, width), ori_shape=(height, width), pad_shape=(height, width))]
    with torch.no_grad():
        return model.inference(torch.randn(1, 3, height, width), metas)


@pytest.mark.parametrize(
    ('size', 'test_cfg', 'windows', 'shapes'),
    [
        ((32, 96), dict(mode='slide', crop_size=(32, 32), stride=(16, 16)), 5, 1),
        ((96, 96), dict(mode='slide', crop_size=(32, 32), stride=(32, 32)), 9, 1),
        ((16, 48), dict(mode='slide', crop_size=(32, 32), stride=(32, 32)), 2, 1),
        ((40, 48), dict(mode='whole'), 1, 1),
    ],
)
@pytest.mark.parametrize('base', ['mmdyt.DyTEncoderDecoder', 'EncoderDecoder'])
def test_windows_of_one_shape_run_once_while_a_sample_is_tried(base, size, test_cfg, windows, shapes):
    counted = []
    model = segmentor(counted, base, **test_cfg)
    with windows_once(model):
        tried = infer(model, *size)
    assert len(counted) == len(set(counted)) == shapes
    counted.clear()
    assert infer(model, *size).shape == tried.shape and len(counted) == windows
    assert 'encode_decode' not in vars(model)


def test_a_sample_that_fails_leaves_the_model_as_it_was():
    model = segmentor([], mode='slide', crop_size=(32, 32), stride=(32, 32))
    with pytest.raises(RuntimeError, match='broken'), windows_once(model):
        raise RuntimeError('broken')
    assert 'encode_decode' not in vars(model)


def test_windows_of_a_users_own_segmentor_all_run():
    class Own(MODELS.get('mmdyt.DyTEncoderDecoder')):
        def encode_decode(self, inputs, batch_img_metas):
            return super().encode_decode(inputs, batch_img_metas)

    counted = []
    model = segmentor(counted, Own, mode='slide', crop_size=(32, 32), stride=(32, 32))
    with windows_once(model):
        infer(model, 32, 96)
    assert len(counted) == 3


def test_other_models_pass():
    with windows_once(torch.nn.Linear(1, 1)):
        pass
