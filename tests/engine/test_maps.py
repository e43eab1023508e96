"""Maps of dispatch against decisions that are known from the pixels: a token is active where its patch is bright."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS, DefaultScope
from mmseg.structures import SegDataSample
from test_flops import build
from test_flops_clips import AGGREGATED, T
from test_flops_clips import build as build_recognizer

import mmdyt.models.classifier  # noqa: F401  registers
from mmdyt.core.dispatch import Dispatch
from mmdyt.core.observe import decisions
from mmdyt.engine.costs import CostCounter
from mmdyt.engine.maps import MapRecorder

PATCH = 16
SLIDE = dict(mode='slide', crop_size=(48, 64), stride=(32, 48))
TOO_MANY = dict(mode='slide', crop_size=(32, 32), stride=(16, 16), windows_per_pass=3)


class BrightTokens:
    """Within its context the tokens of bright patches are active, in every second layer all others."""

    def __init__(self, model, patch=PATCH):
        self.backbone, self.patch = model.backbone, patch
        self.pixels = None

    def __enter__(self):
        self.hook = self.backbone.register_forward_pre_hook(self.look)
        self.layers = 0
        self.rules = decisions(self.backbone, self.decide)
        self.rules.__enter__()

    def __exit__(self, *error):
        self.hook.remove()
        self.rules.__exit__(None, None, None)

    def look(self, backbone, args):
        (x,) = args
        x = x.transpose(1, 2).flatten(0, 1) if x.dim() == 5 else x
        x = F.pad(x, (0, -x.shape[3] % self.patch, 0, -x.shape[2] % self.patch))
        self.pixels = F.avg_pool2d(x[:, :1], self.patch)
        self.layers = 0

    def decide(self, dispatcher, x, state):
        bright = self.pixels.flatten(1)[..., None]
        if self.layers % 2:
            bright = -bright
        self.layers += 1
        mask = F.pad((bright > 0).float(), (0, 0, 1, 0), value=1.0)
        return Dispatch(mask, bright, 1)


def picture(rows, columns, seed=0) -> torch.Tensor:
    """(3, 16 rows, 16 columns), each patch either bright or dark."""
    signs = torch.randint(0, 2, (3, rows, columns), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    return signs.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)


def expected(image, layers=4) -> torch.Tensor:
    """(L, 1, rows, columns)."""
    bright = F.avg_pool2d(image[None, :1], PATCH)[0] > 0
    return torch.stack([bright if i % 2 == 0 else ~bright for i in range(layers)]).double()


@pytest.fixture
def segmentor(tiny_model_cfg):
    return lambda test_cfg: build(tiny_model_cfg | dict(test_cfg=test_cfg))


def sample(height, width, **meta):
    size = dict(ori_shape=(height, width), img_shape=(height, width), pad_shape=(height, width))
    return SegDataSample(metainfo=size | dict(padding_size=[0, 0, 0, 0], img_path='x.png') | meta)


@torch.no_grad()
@pytest.mark.parametrize('batch', [1, 2, 5])
@pytest.mark.parametrize('test_cfg', [dict(mode='whole'), SLIDE, TOO_MANY], ids=['whole', 'slide', 'several'])
@pytest.mark.parametrize('size', [(4, 6), (5, 3), (2, 2)])
def test_maps_are_in_the_coordinates_of_each_image(segmentor, test_cfg, size, batch):
    images = torch.stack([picture(*size, seed) for seed in range(batch)])
    model = segmentor(test_cfg)
    with BrightTokens(model), MapRecorder(model) as recorder:
        model(images, [sample(*images.shape[2:]) for _ in images], mode='predict')
        maps = recorder.take()
    assert recorder.take() == [] and len(maps) == batch
    for image, found in zip(images, maps, strict=True):
        torch.testing.assert_close(found.activation(), expected(image))
        torch.testing.assert_close(found.logits().sign(), 2 * expected(image) - 1)
        assert found.layers == [f'layer_{i}' for i in range(4)]


@torch.no_grad()
@pytest.mark.parametrize('test_cfg', [dict(mode='whole'), SLIDE], ids=['whole', 'slide'])
def test_flips_and_scales_of_an_augmented_test_are_undone(segmentor, test_cfg):
    model, image = segmentor(test_cfg), picture(4, 6)
    tta = MODELS.build(dict(type='SegTTAModel', module=model)).eval()
    double = image.repeat_interleave(2, 1).repeat_interleave(2, 2)
    views = [
        (image, dict()),
        (image.flip(2), dict(flip=True, flip_direction='horizontal')),
        (double, dict()),
        (double.flip(1), dict(flip=True, flip_direction='vertical')),
    ]
    data = dict(
        inputs=[[view * 50 + 100] for view, _ in views],
        data_samples=[[sample(*view.shape[1:], ori_shape=(64, 96), **meta)] for view, meta in views],
    )
    model.data_preprocessor.mean = torch.full((3, 1, 1), 100.0)
    model.data_preprocessor._enable_normalize = True
    model.data_preprocessor.std = torch.ones(3, 1, 1)
    model.data_preprocessor.channel_conversion = False
    with BrightTokens(model), MapRecorder(tta) as recorder:
        tta.test_step(data)
        (found,) = recorder.take()
    torch.testing.assert_close(found.activation(), expected(image))
    consistency = found.consistency()
    assert consistency['flip'] == pytest.approx(1)
    if test_cfg is SLIDE:
        assert consistency['windows'] == pytest.approx(1)


@torch.no_grad()
@pytest.mark.parametrize(
    ('test_cfg', 'sides'),
    [(dict(mode='whole'), (0, 40, 0, 24)), (dict(mode='whole'), (16, 5, 32, 3)), (SLIDE, (0, 48, 0, 32))],
)
def test_padding_is_not_in_the_map(segmentor, test_cfg, sides):
    model, image = segmentor(test_cfg), picture(3, 4)
    padded = F.pad(image, sides, value=9.0)
    other = torch.full_like(padded, -1.0)
    samples = [
        sample(48, 64, padding_size=list(sides), pad_shape=padded.shape[1:]),
        sample(*padded.shape[1:]),
    ]
    with BrightTokens(model), MapRecorder(model) as recorder:
        model(torch.stack([padded, other]), samples, mode='predict')
        found, whole = recorder.take()
    torch.testing.assert_close(found.activation(), expected(image))
    assert whole.activation().shape[-2:] == tuple(-(-side // PATCH) for side in padded.shape[1:])
    rows = expected(image).squeeze(1)
    pairs = (rows[:, 1:] == rows[:, :-1]).sum() + (rows[:, :, 1:] == rows[:, :, :-1]).sum()
    if test_cfg is SLIDE:  # whose windows in padding alone have no neighbours
        assert 0 < found.consistency()['neighbours'] < 1
    else:
        assert found.consistency() == dict(neighbours=pytest.approx(pairs.item() / (4 * (2 * 4 + 3 * 3))))


@torch.no_grad()
@pytest.mark.parametrize('at_once', [None, 2])
def test_views_of_clips_are_kept_apart(at_once):
    options = {} if at_once is None else dict(test_cfg=dict(max_testing_views=at_once))
    model = build_recognizer(AGGREGATED | options)
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(0, 2, (2, 3, T, 4, 4), generator=generator) * 2.0 - 1  # clips, views, frames
    pixels = cells.repeat_interleave(8, 3).repeat_interleave(8, 4)
    clips = pixels[:, :, None].expand(-1, -1, 3, -1, -1, -1)
    with BrightTokens(model, patch=8), MapRecorder(model) as recorder:
        from mmaction.structures import ActionDataSample

        model(clips, [ActionDataSample().set_gt_label(0) for _ in clips], mode='predict')
        maps = recorder.take()
    assert [found.views for found in maps] == [3, 3]
    for clip, found in zip(cells, maps, strict=True):
        for view, frames in enumerate(clip):
            torch.testing.assert_close(found.activation(view)[0], (frames > 0).double())
        still = (clip[:, 1:] == clip[:, :-1]).double().mean().item()
        assert found.consistency()['time'] == pytest.approx(still)


@torch.no_grad()
def test_images_of_a_classifier(tiny_cls_config):
    from mmengine.config import Config

    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = build(Config.fromfile(tiny_cls_config).model)
    images = torch.stack([picture(2, 2, seed) for seed in range(3)])
    with BrightTokens(model), MapRecorder(model) as recorder:
        model(images, mode='tensor')
        maps = recorder.take()
    for image, found in zip(images, maps, strict=True):
        torch.testing.assert_close(found.activation(), expected(image, len(found.layers)))


@torch.no_grad()
def test_a_host_that_was_not_called_is_refused(segmentor):
    model = segmentor(dict(mode='whole'))
    with MapRecorder(model), pytest.raises(RuntimeError, match='model must run its backbone as mmpretrain, mmseg or'):
        model.backbone(torch.zeros(1, 3, 64, 64))


@torch.no_grad()
@pytest.mark.parametrize(('dispatch', 'keys'), [('mlp', 'active'), ('layer', 'all')])
def test_branches_that_see_no_patch_are_left_out(dispatch, keys):
    arch = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64)
    vit = dict(type='mmdyt.DyTVisionTransformer', arch=arch, img_size=32, patch_size=8)
    vit |= dict(dispatch=dispatch, keys=keys, skip_unread=True)
    head = dict(type='VisionTransformerClsHead', num_classes=5, in_channels=32)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = build(dict(type='mmdyt.DyTImageClassifier', backbone=vit, head=head))
    with CostCounter(model) as counter, MapRecorder(model) as recorder:
        model(torch.randn(2, 3, 32, 32), mode='tensor')
        counter.add_images(2)
        maps = recorder.take()
    for found, line in zip(maps, counter.costs().lines(), strict=True):
        rates = dict(zip(found.layers, found.activation().mean(dim=(1, 2, 3)).tolist(), strict=True))
        assert rates == pytest.approx(line['rates']) and list(rates) == ['layer_0', 'layer_1']
        assert found.logits() is not None


@torch.no_grad()
def test_broken_logits_break_their_own_cells_only(segmentor):
    model, image = segmentor(dict(mode='whole')), picture(4, 6)
    image[:, :16, :16] = torch.nan
    with BrightTokens(model), MapRecorder(model) as recorder:
        model(image[None], [sample(64, 96)], mode='predict')
        (found,) = recorder.take()
    assert found.logits().isnan().flatten(1).sum(1).tolist() == 4 * [1]


@torch.no_grad()
def test_frames_of_a_2d_recognizer_are_its_views():
    arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
    vit = dict(type='mmdyt.DyTVisionTransformer', arch=arch, img_size=32, patch_size=8, out_type='featmap')
    head = dict(type='TSNHead', num_classes=5, in_channels=32)
    with DefaultScope.overwrite_default_scope('mmaction'):
        model = build(dict(type='Recognizer2D', backbone=vit, cls_head=head))
    cells = torch.randint(0, 2, (2, 4, 4, 4), generator=torch.Generator().manual_seed(0)) * 2.0 - 1  # clips, frames
    clips = cells.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, None].expand(-1, -1, 3, -1, -1)
    with BrightTokens(model, patch=8), MapRecorder(model) as recorder:
        model(clips, mode='tensor')
        maps = recorder.take()
    for clip, found in zip(cells, maps, strict=True):
        for i, frame in enumerate(clip):
            torch.testing.assert_close(found.activation(i)[0, 0], (frame > 0).double())


@torch.no_grad()
def test_padding_of_mmpretrain_is_not_in_the_map(tiny_cls_config):
    from mmengine.config import Config
    from mmpretrain.structures import DataSample

    cfg = Config.fromfile(tiny_cls_config).model
    cfg.data_preprocessor = dict(type='ClsDataPreprocessor', pad_size_divisor=64)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = build(cfg)
    image = picture(2, 3)
    batch = F.pad(image, (0, 16, 0, 32), value=9.0)[None]
    with BrightTokens(model), MapRecorder(model) as recorder:
        model(batch, [DataSample(metainfo=dict(img_shape=(32, 48)))], mode='tensor')
        (found,) = recorder.take()
    torch.testing.assert_close(found.activation(), expected(image, len(found.layers)))
