import copy

import pytest
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData

import mmdyt.models.segmentor  # noqa: F401  repairs the wheels before mmseg is imported
from mmdyt.core.grid import windows
from mmdyt.core.observe import complete_model, dynamic_branches, record_dispatch
from mmdyt.engine.maps import MapRecorder, SampleMap

# isort: split
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample


@pytest.fixture
def cfg(tiny_config):
    cfg = Config.fromfile(tiny_config, import_custom_modules=False)
    cfg.model.backbone.init_cfg = None
    init_default_scope('mmseg')
    return cfg


@pytest.fixture
def model(cfg):
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)  # through mmseg's registry, default_scope 'mmseg'
    for branch in dynamic_branches(model).values():
        nn.init.normal_(branch.adapter.up.weight, std=0.1)
        nn.init.normal_(branch.dispatcher.gate.weight)
    return model


def samples(count=2, height=64, width=64):
    def sample():
        return SegDataSample(
            gt_sem_seg=PixelData(data=torch.randint(0, 3, (1, height, width))),
            metainfo=dict(ori_shape=(height, width), img_shape=(height, width), img_path='x.png'),
        )

    return [sample() for _ in range(count)]


def test_losses_are_the_hosts_and_the_rate_loss(model):
    model.train()
    inputs, data_samples = torch.randn(2, 3, 64, 64), samples()
    torch.manual_seed(1)
    with record_dispatch(model) as record:
        losses = model.loss(inputs, data_samples)
    rate = torch.cat([d.patch_mask for d in record.flat()]).mean()
    assert len(record.flat()) == 4  # one pass through four layers
    torch.testing.assert_close(losses['loss_rate'], 2.0 * (rate - 0.5) ** 2)
    torch.testing.assert_close(losses['activation_rate'], rate)
    torch.manual_seed(1)
    stock = type(model).__mro__[2].loss(model, inputs, data_samples)
    assert set(losses) - set(stock) == {'loss_rate', 'activation_rate'}
    for name, value in stock.items():
        assert torch.equal(value, losses[name])


def test_auxiliary_loss_has_weight_0_4(cfg, model):
    heavier = copy.deepcopy(cfg.model)
    heavier.auxiliary_head.loss_decode.loss_weight = 0.8
    other = MODELS.build(heavier)
    other.load_state_dict(model.state_dict())
    inputs, data_samples = torch.randn(2, 3, 64, 64), samples()
    values = []
    for m in (model, other):
        torch.manual_seed(1)
        values.append(m.train().loss(inputs, data_samples)['aux.loss_ce'])
    torch.testing.assert_close(2 * values[0], values[1])


def test_parsed_loss_sums_losses_only(model):
    losses = model.train().loss(torch.randn(2, 3, 64, 64), samples())
    total, _ = model.parse_losses(losses)
    expected = losses['decode.loss_ce'] + losses['aux.loss_ce'] + losses['loss_rate']
    torch.testing.assert_close(total, expected)


def test_rate_loss_moves_the_rate_to_its_target(cfg):
    """Trained on the rate loss alone, the sampled rate reaches a target away from where it starts."""
    model = MODELS.build(cfg.model | dict(target_rate=0.2)).train()
    model.init_weights()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    inputs, data_samples = torch.randn(2, 3, 64, 64), samples()
    rates = []
    for _ in range(60):
        losses = model.loss(inputs, data_samples)
        rates.append(losses['activation_rate'].item())
        optimizer.zero_grad()
        losses['loss_rate'].backward()
        optimizer.step()
    assert sum(rates[:3]) / 3 > 0.35
    assert abs(sum(rates[-10:]) / 10 - 0.2) < 0.05


def test_gradients_reach_tuned_parts_only(model):
    total, _ = model.parse_losses(model.train().loss(torch.randn(2, 3, 64, 64), samples()))
    total.backward()
    for name, parameter in model.named_parameters():
        tuned = not name.startswith('backbone.') or '.dynamic.' in name
        assert parameter.requires_grad == tuned
        assert (parameter.grad is not None) == tuned, name
    gates = [branch.dispatcher.gate.weight.grad.abs().sum() for branch in dynamic_branches(model).values()]
    assert all(grad > 0 for grad in gates)


@pytest.mark.parametrize('dispatch', ['attn', 'attn_mlp', 'layer'])
@pytest.mark.parametrize('adapter', ['mmdyt.Adapter', 'mmdyt.MoEAdapter'])
def test_every_variant_trains(cfg, dispatch, adapter):
    backbone = cfg.model.backbone | dict(dispatch=dispatch, adapter=dict(type=adapter, bottleneck=4))
    model = MODELS.build(cfg.model | dict(backbone=backbone))
    model.init_weights()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    inputs, data_samples = torch.randn(2, 3, 64, 64), samples()
    for sample in data_samples:
        sample.gt_sem_seg.data.fill_(1)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    values = []
    for _ in range(12):
        total, _ = model.parse_losses(model.train().loss(inputs, data_samples))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(total.item())
    assert sum(values[-3:]) < 0.9 * sum(values[:3])
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert all(branch.dispatcher.gate.weight.grad.abs().sum() > 0 for branch in dynamic_branches(model).values())


@torch.no_grad()
def test_whole_inference_packed_equals_masked(model):
    model.eval()
    inputs = torch.randn(2, 3, 64, 96)
    packed = model(inputs, mode='tensor')
    for branch in dynamic_branches(model).values():
        branch.inference = 'masked'
    torch.testing.assert_close(packed, model(inputs, mode='tensor'), rtol=0, atol=1e-5)


@torch.no_grad()
def test_slide_inference_is_the_mean_of_its_windows(model):
    model.eval()
    model.test_cfg = Config(dict(mode='slide', crop_size=(64, 64), stride=(32, 32)))
    inputs = torch.randn(1, 3, 64, 96)
    with record_dispatch(model) as record:
        (result,) = model.predict(inputs)
    assert [len(passes) for passes in record.dispatches.values()] == [2] * 4
    left, right = (model(inputs[..., x : x + 64], mode='tensor') for x in (0, 32))
    left, right = (nn.functional.interpolate(y, (64, 64), mode='bilinear') for y in (left, right))
    overlap = (left[..., 32:] + right[..., :32]) / 2
    expected = torch.cat([left[..., :32], overlap, right[..., 32:]], dim=-1)[0]
    torch.testing.assert_close(result.seg_logits.data, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('size', [(64, 96), (80, 112), (40, 64)])
@pytest.mark.parametrize('at_once', [2, 3, 100])
def test_several_windows_at_once_give_what_mmseg_gives_one_by_one(model, at_once, size):
    model.eval()
    slide, inputs = dict(mode='slide', crop_size=(64, 64), stride=(24, 24)), torch.randn(2, 3, *size)
    model.test_cfg = Config(slide)
    one_by_one = [sample.seg_logits.data for sample in model.predict(inputs)]
    model.test_cfg = Config(slide | dict(windows_per_pass=at_once))
    with record_dispatch(model) as record:
        together = [sample.seg_logits.data for sample in model.predict(inputs)]
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=1e-5)
    number = len(windows(size, (64, 64), (24, 24)))
    assert {len(passes) for passes in record.dispatches.values()} == {-(-number // at_once)}


@torch.no_grad()
def test_scores_of_windows_are_added_in_the_precision_of_the_images(model):
    model.eval()
    slide = dict(mode='slide', crop_size=(64, 64), stride=(24, 24))
    inputs, found = torch.randn(1, 3, 80, 112), []
    encode_decode = model.encode_decode
    model.encode_decode = lambda *args: encode_decode(*args).bfloat16()  # as under mixed precision
    for at_once in (1, 4):
        model.test_cfg = Config(slide | dict(windows_per_pass=at_once))
        found.append(model.predict(inputs)[0].seg_logits.data)
    assert found[0].dtype == found[1].dtype == torch.float32
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-2 * found[0].abs().max().item())


@torch.no_grad()
def test_stock_tta_model_runs(model):
    tta = MODELS.build(dict(type='SegTTAModel', module=model)).eval()
    image = torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8)
    views = [[image], [image.flip(-1)]]
    meta = dict(ori_shape=(64, 64), img_shape=(64, 64), img_path='x.png')
    views_samples = [
        [SegDataSample(metainfo=meta | dict(flip=flip, flip_direction='horizontal'))] for flip in (False, True)
    ]
    (result,) = tta.test_step(dict(inputs=views, data_samples=views_samples))
    assert result.pred_sem_seg.shape == (64, 64)


@torch.no_grad()
def test_complete_model_with_fresh_adapters_is_stock_encoder_decoder(cfg):
    dynamic = MODELS.build(cfg.model)
    backbone = {k: v for k, v in cfg.model.backbone.items() if k not in ('dispatch', 'adapter', 'dispatcher')}
    stock_cfg = {k: v for k, v in cfg.model.items() if k not in ('target_rate', 'rate_weight')}
    stock_cfg |= dict(type='EncoderDecoder', backbone=backbone | dict(type='mmpretrain.VisionTransformer'))
    stock = MODELS.build(stock_cfg)
    missing, unexpected = dynamic.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected and all('.dynamic.' in name for name in missing)
    stock.backbone.eval()
    stock.decode_head.eval(), stock.neck.eval(), dynamic.eval()
    inputs = torch.randn(1, 3, 64, 64)
    with complete_model(dynamic):
        assert torch.equal(dynamic(inputs, mode='tensor'), stock(inputs, mode='tensor'))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(target_rate=50), r'target_rate must lie in \(0, 1\], got 50. Rates are fractions, not percent.'),
        (dict(target_rate=None), r'target_rate must lie in \(0, 1\], got None'),
        (dict(target_rate=0), r'target_rate must lie in \(0, 1\], got 0'),
        (dict(rate_weight=-1), 'rate_weight must be at least 0, got -1'),
        (dict(test_cfg=dict(mode='slide', windows_per_pass=0)), 'test_cfg.windows_per_pass must be at least 1, got 0'),
    ],
)
def test_mistakes_are_refused_in_the_constructor(cfg, arguments, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(cfg.model | arguments)


class TestCompleteModelLosses:
    def test_are_opt_in_per_pixel_and_follow_the_equations(self, cfg):
        torch.manual_seed(0)
        model = MODELS.build(cfg.model | dict(complete_weight=0.5, distill_weight=2.0)).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout | nn.Dropout2d):
                module.p = 0.0
        for branch in dynamic_branches(model).values():
            nn.init.normal_(branch.adapter.up.weight, std=0.1)
        inputs, data_samples = torch.randn(2, 3, 64, 64), samples()
        torch.manual_seed(1)
        losses = model.loss(inputs, data_samples)
        torch.manual_seed(1)
        student = model.decode_head(model.extract_feat(inputs))
        with complete_model(model):
            features = model.extract_feat(inputs)
            teacher = model.decode_head(features)
            stock = model.decode_head.loss_by_feat(teacher, data_samples)
        q, p = student.softmax(1), teacher.softmax(1)
        pixels = (p * (p / q).log()).sum(1)  # (B, H, W)
        torch.testing.assert_close(losses['loss_distill'], 2.0 * pixels.mean(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(losses['complete.decode.loss_ce'], 0.5 * stock['loss_ce'], rtol=1e-4, atol=1e-6)
        assert 'complete.aux.loss_ce' in losses  # all of the host's losses

    def test_without_them_nothing_runs_twice(self, model):
        passes = []
        model.backbone.register_forward_hook(lambda *args: passes.append(1))
        losses = model.train().loss(torch.randn(2, 3, 64, 64), samples())
        assert len(passes) == 1 and not any('complete' in name or 'distill' in name for name in losses)

    def test_a_head_without_pixel_logits_is_refused(self, cfg):
        cfg.model.decode_head = dict(
            type='SegmenterMaskTransformerHead', in_channels=32, channels=32, num_classes=3, num_layers=1, num_heads=1,
            embed_dims=32, in_index=3, loss_decode=dict(type='CrossEntropyLoss'))  # fmt: skip
        with pytest.raises(ValueError, match='distill_weight must be 0 with a decode head without conv_seg, got 1.0'):
            MODELS.build(cfg.model | dict(distill_weight=1.0))
        for complete_weight in (0.0, 1.0):
            losses = (
                MODELS.build(cfg.model | dict(complete_weight=complete_weight))
                .train()
                .loss(torch.randn(2, 3, 64, 64), samples())
            )
            assert ('complete.decode.loss_ce' in losses) == bool(complete_weight) and 'loss_rate' in losses

    def test_a_binary_head_of_one_output_is_refused_with_distillation_only(self, cfg):
        binary = dict(num_classes=2, out_channels=1, threshold=0.3)
        binary |= dict(loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True))
        cfg.model.decode_head.update(binary)
        cfg.model.auxiliary_head.update(binary)
        with pytest.raises(ValueError, match='distill_weight must be 0 with one class, whose .*, got 1.0 with a Conv'):
            MODELS.build(cfg.model | dict(distill_weight=1.0))
        assert MODELS.build(cfg.model | dict(complete_weight=1.0)).distill_weight == 0

    def test_running_statistics_are_those_of_the_dynamic_model(self, cfg):
        norms = []
        for weights in (dict(), dict(complete_weight=1.0, distill_weight=1.0)):
            torch.manual_seed(0)
            model = MODELS.build(cfg.model | weights).train()
            inputs, data_samples = torch.randn(2, 3, 64, 64), samples()
            torch.manual_seed(1)
            model.loss(inputs, data_samples)
            norm = model.decode_head.fpn_bottleneck.bn
            norms.append((norm.running_mean, norm.momentum))
        assert norms[0][0].abs().sum() > 0 and norms[0][1] == norms[1][1] == 0.1
        torch.testing.assert_close(norms[0][0], norms[1][0])


@torch.no_grad()
@pytest.mark.parametrize('stride', [(32, 32), (24, 40)])  # on cells, and between them
def test_later_windows_take_over_what_earlier_ones_decided(model, stride):
    model.eval()
    slide, inputs = dict(mode='slide', crop_size=(64, 64), stride=stride), torch.randn(2, 3, 96, 128)
    seen = {}
    for reuses in (False, True):
        model.test_cfg = Config(slide | dict(reuse_decisions=reuses))
        with MapRecorder(model) as maps:
            scores = [sample.seg_logits.data for sample in model(inputs, samples(2, 96, 128), mode='predict')]
        looks = [sample.looks for sample in maps.take()]
        seen[reuses] = scores, looks, [SampleMap([], one).consistency()['windows'] for one in looks]
    for first, again in zip(*(seen[reuses][1] for reuses in (False, True)), strict=True):
        assert torch.equal(first[0].masks, again[0].masks)  # the first window decides as ever
    on_cells = stride == (32, 32)
    for before, after in zip(seen[False][2], seen[True][2], strict=True):
        assert before < after and (after == pytest.approx(1.0) or not on_cells)
    if on_cells:  # every cell has one decision, that of the first window which saw it
        for sample in SampleMap([], seen[True][1][0]), SampleMap([], seen[True][1][1]):
            assert set(sample.activation().unique().tolist()) <= {0.0, 1.0}
    with complete_model(model):  # nothing is decided, and nothing remembered
        complete = [sample.seg_logits.data for sample in model.predict(inputs)]
        model.test_cfg = Config(slide)
        torch.testing.assert_close([sample.seg_logits.data for sample in model.predict(inputs)], complete)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(reuse_decisions='yes'), "test_cfg.reuse_decisions must be True or False, got 'yes'"),
        (dict(reuse_decisions=True, windows_per_pass=2), 'test_cfg.windows_per_pass must be 1 with reuse_decisions'),
    ],
)
def test_reuse_is_refused_where_it_cannot_be(cfg, options, message):
    cfg.model.test_cfg = dict(mode='slide', crop_size=(64, 64), stride=(32, 32), **options)
    with pytest.raises(ValueError, match=message):
        MODELS.build(cfg.model)
