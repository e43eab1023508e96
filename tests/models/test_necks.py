"""MoE-adapters between a frozen backbone and the head: alone, and inside mmpretrain and mmseg."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from test_vit import TINY

import mmdyt.models.classifier
import mmdyt.models.segmentor  # noqa: F401  registers
from mmdyt.core.macs import count_macs
from mmdyt.core.tuning import count_parameters
from mmdyt.engine.host import part_macs
from mmdyt.models import MoEAdapterNeck, necks

# isort: split
from mmpretrain.registry import MODELS as MMPRETRAIN
from mmpretrain.structures import DataSample
from mmseg.registry import MODELS as MMSEG
from mmseg.structures import SegDataSample

SHAPES = [(3, 6), (3, 5, 6), (3, 6, 2, 4)]  # a vector, tokens and a map of three images
SMALL = dict(bottleneck=4, num_experts=3, dropout=0.0)
BN = dict(type='BN')


def features(shapes=SHAPES, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)


def make(in_channels=(6, 6, 6), adapter=SMALL, fresh=False, **options):
    """A neck in double precision; unless fresh, each adapter has random weights, so that it has something to say."""
    torch.manual_seed(0)
    neck = MoEAdapterNeck(in_channels, adapter=adapter, **options).double()
    for parameter in () if fresh else neck.levels.parameters():
        nn.init.normal_(parameter)
    return neck


def update_by_hand(adapter, tokens):
    """What eq. (7) adds to the tokens (N, C) of one image."""
    a = adapter.router(tokens.mean(0)).softmax(0)
    down, down_bias, up, up_bias = (
        sum(a[i] * weight[i] for i in range(len(a)))
        for weight in (adapter.down_weight, adapter.down_bias, adapter.up_weight, adapter.up_bias)
    )
    return adapter.scale * (torch.relu(tokens @ down.T + down_bias) @ up.T + up_bias)


class TestFunction:
    @pytest.mark.parametrize('kind', [list, tuple])
    def test_it_returns_a_tuple_of_the_shapes_it_got(self, kind):
        out = make()(kind(features()))
        assert isinstance(out, tuple) and [tuple(x.shape) for x in out] == SHAPES

    def test_maps_are_contiguous_even_where_the_backbones_are_not(self):
        (x,) = features([(3, 2, 4, 6)])
        (out,) = make(6)((x.permute(0, 3, 1, 2),))  # as ViTs return them
        assert out.shape == (3, 6, 2, 4) and out.is_contiguous()

    @pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
    @pytest.mark.parametrize('training', [True, False])
    def test_a_fresh_neck_is_the_identity(self, training, dtype):
        neck, x = make(adapter={}, fresh=True).to(dtype).train(training), features(dtype=dtype)
        neck.init_weights()
        assert all(torch.equal(new, old) for new, old in zip(neck(x), x, strict=True))

    def test_it_equals_a_loop_over_images_written_from_equation_7(self):
        neck, x = make(), features()
        vectors, tokens, maps = neck(x)
        adapters = [level.adapter for level in neck.levels]
        for b in range(3):
            expected = x[0][b] + update_by_hand(adapters[0], x[0][b][None])[0]
            torch.testing.assert_close(vectors[b], expected)
            torch.testing.assert_close(tokens[b], x[1][b] + update_by_hand(adapters[1], x[1][b]))
            pixels = torch.stack([x[2][b, :, row, column] for row in range(2) for column in range(4)])
            update = update_by_hand(adapters[2], pixels)
            for i, (row, column) in enumerate((row, column) for row in range(2) for column in range(4)):
                torch.testing.assert_close(maps[b, :, row, column], pixels[i] + update[i])

    @pytest.mark.parametrize('shape', SHAPES[1:])
    def test_different_images_get_different_mixtures(self, shape):
        """A token that two images share is updated differently, as the others of its image say."""
        neck, (x,) = make(6), features([shape])
        first = (slice(None), 0) if len(shape) == 3 else (slice(None), slice(None), 0, 0)
        x[first] = x[first][:1]
        (out,) = neck((x,))
        out = out[first]
        assert (out[0] - out[1]).abs().max() > 1e-3
        level = neck.levels[0].adapter
        nn.init.zeros_(level.router.weight)  # the mixture of its bias, whatever the image
        (out,) = neck((x,))
        torch.testing.assert_close(out[first][0], out[first][1])

    def test_each_level_has_an_adapter_of_its_own(self):
        neck = make()
        x = features([(3, 5, 6)]) * 3
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(neck(x), neck(x)[1:], strict=False))

    def test_an_adapter_without_experts_can_be_chosen(self):
        neck, (x,) = make(6, adapter=dict(type='mmdyt.Adapter', bottleneck=4, dropout=0.0)), features([(3, 5, 6)])
        adapter = neck.levels[0].adapter
        expected = x + 0.1 * adapter.up(torch.relu(adapter.down(x)))
        torch.testing.assert_close(neck((x,))[0], expected)

    def test_parameters_count_as_adapters(self):
        counts = count_parameters(make(in_channels=(6, 8)))
        by_hand = sum(3 * (c + 1 + 2 * c * 4 + 4 + c) for c in (6, 8))
        assert counts['adapter'] == counts['tuned'] == by_hand


def test_at_first_the_up_projections_learn_and_a_step_later_everything():
    neck, x = make(fresh=True), features()

    def gradients():
        neck.zero_grad()
        sum(out.pow(2).sum() for out in neck(x)).backward()
        return {name: parameter.grad.abs().sum() > 0 for name, parameter in neck.named_parameters()}

    assert all(learns == ('.up_' in name) for name, learns in gradients().items())  # the others meet a zero matrix
    torch.optim.SGD(neck.parameters(), lr=0.1).step()
    after = gradients()
    assert all(after.values()), after
    assert sum('router' in name for name in after) == 2 * 3


class TestPyramid:
    @pytest.mark.parametrize(
        ('rescales', 'sizes'),
        [([4, 2, 1, 0.5], [(16, 24), (8, 12), (4, 6), (2, 3)]), ((2, 1, 0.5, 0.25), [(8, 12), (4, 6), (2, 3), (1, 1)])],
    )
    def test_maps_are_adapted_then_rescaled_as_mmseg_does(self, rescales, sizes):
        neck = make([8] * 4, rescales=rescales, norm_cfg=BN)
        x = features([(2, 8, 4, 6)] * 4)
        out = neck(x)
        assert isinstance(out, tuple) and [tuple(level.shape) for level in out] == [(2, 8, *size) for size in sizes]
        flat = make([8] * 4)
        flat.levels.load_state_dict(neck.levels.state_dict())
        pyramid = MMSEG.build(dict(type='Feature2Pyramid', embed_dim=8, rescales=rescales, norm_cfg=BN)).double()
        pyramid.load_state_dict(neck.pyramid.state_dict())
        for got, expected in zip(out, pyramid(flat(x)), strict=True):
            assert torch.equal(got, expected)

    def test_its_norm_is_mmsegs_unless_given(self):
        rescales = [4, 2, 1, 0.5]
        assert isinstance(make([8] * 4, rescales=rescales).pyramid.upsample_4x[1], nn.SyncBatchNorm)
        assert isinstance(make([8] * 4, rescales=rescales, norm_cfg=BN).pyramid.upsample_4x[1], nn.BatchNorm2d)

    def test_without_mmseg_it_is_refused(self, monkeypatch):
        monkeypatch.setattr(necks, 'find_spec', lambda name: None)
        make([8] * 4)
        with pytest.raises(ImportError, match='rescales must be None without mmsegmentation.* `pip install mmsegm'):
            make([8] * 4, rescales=[4, 2, 1, 0.5])


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(in_channels=[]), r'in_channels must hold a positive integer per level, got \[\]'),
        (dict(in_channels=0), 'in_channels must hold a positive integer per level, got 0'),
        (dict(in_channels=[8, -8]), r'in_channels must hold a positive integer per level, got \[8, -8\]'),
        (dict(in_channels=8.0), 'in_channels must hold a positive integer per level, got 8.0'),
        (dict(in_channels=None), 'in_channels must hold a positive integer per level, got None'),
        (dict(in_channels='8'), "in_channels must hold a positive integer per level, got '8'"),
        (
            dict(in_channels=[8] * 3, rescales=[4, 2, 1, 0.5]),
            r'rescales must hold a factor per level, got \[4, 2, 1, 0.5\] for the 3 levels of in_channels \[8, 8, 8\]',
        ),
        (dict(in_channels=8, rescales=2), r'rescales must be \[4, 2, 1, 0.5\] or \[2, 1, 0.5, 0.25\], got \[2\]'),
        (dict(in_channels=[8] * 4, rescales=[0.5, 1, 2, 4]), r'rescales must be .* got \[0.5, 1, 2, 4\]'),
        (
            dict(in_channels=[8, 8, 8, 6], rescales=[4, 2, 1, 0.5]),
            r'in_channels must be equal for a pyramid with rescales, got \[8, 8, 8, 6\]',
        ),
        (dict(in_channels=8, norm_cfg=BN), 'norm_cfg must be None without rescales, whose pyramid it is for, got'),
        (dict(in_channels=8, adapter=None), 'adapter must be a config, got None. Without adapters, leave out'),
        (dict(in_channels=8, adapter=dict(num_experts=0)), 'num_experts must be a positive integer, got 0'),
    ],
)
def test_mistakes_are_refused_in_the_constructor(arguments, message):
    with pytest.raises(ValueError, match=message):
        MoEAdapterNeck(**arguments)


@pytest.mark.parametrize(
    ('options', 'shapes', 'message'),
    [
        (dict(in_channels=[6, 6]), SHAPES, r'features must have 2 levels, as in_channels \[6, 6\] says, got 3'),
        (dict(in_channels=[6, 6]), SHAPES[:1], 'features must have 2 levels, .* got 1. .* out_indices'),
        (dict(in_channels=7), [(3, 6)], r'features\[0\] must have 7 channels, as in_channels says, got .* \(3, 6\)'),
        (dict(in_channels=[6, 5]), [(3, 6), (3, 5, 6)], r'features\[1\] must have 5 channels, .* \(3, 5, 6\)'),
        (dict(in_channels=4), [(3, 6, 2, 4)], r'features\[0\] must have 4 channels, .* \(3, 6, 2, 4\)'),
        (dict(in_channels=6), [(6,)], r'must be \(B, C\), \(B, N, C\) or \(B, C, H, W\), got shape \(6,\)'),
        (dict(in_channels=6), [(3, 6, 2, 2, 2)], r'must be .* got shape \(3, 6, 2, 2, 2\)'),
        (
            dict(in_channels=[6] * 4, rescales=[4, 2, 1, 0.5], norm_cfg=BN),
            [(3, 6, 2, 2)] * 3 + [(3, 4, 6)],
            r"features\[3\] must be maps .* for a pyramid with rescales, got shape \(3, 4, 6\).* out_type='featmap'",
        ),
    ],
)
def test_features_other_than_promised_are_refused(options, shapes, message):
    with pytest.raises(ValueError, match=message):
        make(**options)(features(shapes))


def test_a_bare_tensor_is_refused():
    with pytest.raises(ValueError, match='features must be a tuple with a tensor per level, got a Tensor'):
        make(in_channels=[6] * 3)(features()[0])


class TestInitWeights:
    CONSTANT = dict(type='Constant', layer='Linear', val=1.0, bias=1.0)

    @pytest.mark.parametrize('kind', ['mmdyt.Adapter', 'mmdyt.MoEAdapter'])
    @pytest.mark.parametrize('owner', ['neck', 'host'])
    def test_an_init_cfg_on_linear_leaves_fresh_adapters(self, owner, kind):
        classifier = build_classifier(
            neck=dict(adapter=dict(type=kind), init_cfg=self.CONSTANT if owner == 'neck' else None),
            init_cfg=self.CONSTANT if owner == 'host' else None,
        )
        classifier.init_weights()
        (level,) = classifier.neck.levels
        x = torch.randn(2, 32)
        assert torch.equal(classifier.neck((x,))[0], x)
        for name in ('router.weight', 'down.weight', 'up.weight'):
            weights = dict(level.adapter.named_parameters()).get(name)
            assert weights is None or not (weights == 1.0).any()

    def test_a_checkpoint_of_the_neck_is_kept(self, tmp_path):
        trained = make(fresh=False)
        torch.save(dict(state_dict=trained.state_dict()), tmp_path / 'neck.pth')
        checkpoint = dict(type='Pretrained', checkpoint=str(tmp_path / 'neck.pth'))
        neck = make(fresh=True, init_cfg=[self.CONSTANT, checkpoint])
        neck.init_weights()
        for name, weights in trained.state_dict().items():
            assert torch.equal(neck.state_dict()[name], weights), name


def build_classifier(neck=None, backbone=None, **options):
    """A stock mmpretrain classifier of a frozen plain ViT."""
    frozen = dict(type='mmdyt.DyTVisionTransformer', arch=TINY, img_size=32, patch_size=8)
    frozen |= dict(adapter=None, dispatcher=None) | (backbone or {})
    neck = dict(type='mmdyt.MoEAdapterNeck', in_channels=32) | (neck or {})
    head = dict(type='VisionTransformerClsHead', num_classes=5, in_channels=32)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MMPRETRAIN.build(dict(type='ImageClassifier', backbone=frozen, neck=neck, head=head, **options))


def check_it_trains(model, inputs, samples):
    """Two steps change the whole neck (the first the up-projections only) and leave the backbone as it was."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        loss, _ = model.train().parse_losses(model.loss(inputs, samples))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith('backbone.')
        if name.startswith(('backbone.', 'neck.levels.')):
            assert torch.equal(parameter, before[name]) == name.startswith('backbone.'), name


class TestInMMPretrain:
    @pytest.mark.parametrize('out_type', ['cls_token', 'avg_featmap'])
    def test_it_trains_behind_a_frozen_backbone(self, out_type):
        model = build_classifier(backbone=dict(out_type=out_type))
        model.init_weights()
        nn.init.normal_(model.head.layers.head.weight)
        samples = [DataSample().set_gt_label(i) for i in range(3)]
        images = torch.randn(3, 3, 32, 32)
        check_it_trains(model, images, samples)
        assert [s.pred_score.shape for s in model.eval().predict(images, samples)] == [(5,)] * 3

    @torch.no_grad()
    def test_a_fresh_neck_changes_no_prediction(self):
        model, images = build_classifier().eval(), torch.randn(2, 3, 32, 32)
        assert torch.equal(model(images), model.head(model.backbone(images)))

    def test_maps_of_several_layers_reach_the_head_adapted(self):
        neck = dict(in_channels=[32, 32, 32])
        model = build_classifier(neck, dict(out_type='featmap', out_indices=(0, 1, 2), final_norm=False)).eval()
        assert [tuple(x.shape) for x in model.extract_feat(torch.randn(2, 3, 32, 32))] == [(2, 32, 4, 4)] * 3


class TestInMMSeg:
    @pytest.fixture
    def model(self, tiny_model_cfg):
        tiny_model_cfg.backbone |= dict(adapter=None, dispatcher=None)
        rescales = dict(rescales=[4, 2, 1, 0.5], norm_cfg=BN)
        tiny_model_cfg.neck = dict(type='mmdyt.MoEAdapterNeck', in_channels=[32] * 4, adapter=SMALL, **rescales)
        torch.manual_seed(0)
        model = MMSEG.build(tiny_model_cfg)
        model.init_weights()
        return model

    def test_it_trains_behind_a_frozen_backbone(self, model):
        labels = torch.arange(64 * 64).reshape(1, 64, 64) % 3
        meta = dict(ori_shape=(64, 64), img_shape=(64, 64), img_path='x.png')
        samples = [SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=meta) for _ in range(2)]
        check_it_trains(model, torch.randn(2, 3, 64, 64), samples)

    @torch.no_grad()
    def test_a_fresh_neck_is_stock_feature2pyramid(self, model):
        images = torch.randn(1, 3, 64, 96)
        model.eval()
        plain = model.neck.pyramid([x.contiguous() for x in model.backbone(images)])
        for got, expected in zip(model.extract_feat(images), plain, strict=True):
            assert torch.equal(got, expected)

    @torch.no_grad()
    def test_neck_is_counted_as_the_operators_that_run(self, model):
        x = tuple(torch.randn(1, 32, 4, 6) for _ in range(4))
        assert part_macs(model, x)['neck'] == count_macs(lambda: model.eval().neck(x)) > 0


@pytest.mark.parametrize(
    ('shape', 'tokens'), [((2, 32), 1), ((2, 7, 32), 7), ((2, 32, 4, 6), 24)], ids=['vector', 'tokens', 'map']
)
def test_macs_of_the_neck_are_those_of_the_closed_form(shape, tokens):
    c, d, e = 32, 4, 3
    host = SimpleNamespace(neck=MoEAdapterNeck([c, c], SMALL))
    level = tokens * 2 * c * d + e * (c + 2 * c * d + d + c)
    assert part_macs(host, (torch.empty(shape),) * 2)['neck'] == 2 * level  # of one image, whatever the batch


def test_macs_of_the_neck_with_a_pyramid_are_those_of_both():
    c, d, e = 32, 4, 3
    host = SimpleNamespace(neck=MoEAdapterNeck([c] * 4, SMALL, rescales=[4, 2, 1, 0.5]))
    adapters = 4 * (24 * 2 * c * d + e * (c + 2 * c * d + d + c))
    pyramid = (4 * 6 + 8 * 12 + 4 * 6) * 4 * c * c  # transposed convolutions of 2 x 2: two for x4, one for x2
    assert part_macs(host, (torch.empty(2, c, 4, 6),) * 4)['neck'] == adapters + pyramid
