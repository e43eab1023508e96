"""FLOPsHook against what really ran: torch's operator counter, and the closed form by hand."""

import logging
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from mmengine.registry import MODELS
from mmseg.structures import SegDataSample

from mmdyt.core.context import RECORDS, asked_of
from mmdyt.core.macs import count_macs
from mmdyt.core.observe import complete_model, dynamic_branches
from mmdyt.engine.costs import CostCounter
from mmdyt.engine.flops import FLOPsHook
from mmdyt.engine.host import find_host, part_macs

C, HIDDEN, LAYERS, BOTTLENECK = 32, 64, 4, 4  # the tiny ViT
WHOLE = dict(mode='whole')
SLIDE = dict(mode='slide', crop_size=(64, 64), stride=(48, 48))


def build(cfg) -> nn.Module:
    """A model whose dispatchers choose different tokens in every image and layer."""
    torch.manual_seed(0)
    model = MODELS.build(cfg).eval()
    for branch in dynamic_branches(model).values():
        nn.init.normal_(branch.dispatcher.gate.weight, std=1.0)
    return model


def make_runner(model: nn.Module) -> SimpleNamespace:
    scalars = {}
    hub = SimpleNamespace(scalars=scalars, update_scalar=scalars.__setitem__)
    return SimpleNamespace(model=model, logger=logging.getLogger('flops'), message_hub=hub)


def evaluate(model: nn.Module, *batches: torch.Tensor) -> dict[str, float]:
    """What the hook adds to the metrics when the model predicts some batches of images."""
    hook, runner, metrics = FLOPsHook(lines=False), make_runner(model), {}
    hook.before_val_epoch(runner)
    for i, images in enumerate(batches):
        with torch.no_grad():
            outputs = model.predict(images)
        hook.after_val_iter(runner, i, outputs=outputs)
    hook.after_val_epoch(runner, metrics)
    assert not model.backbone._forward_hooks and not any(asked_of(RECORDS, b) for b in dynamic_branches(model).values())
    return metrics


def macs_by_hand(patches: int, active: list[float], adapted: bool = True) -> float:
    """One pass of the tiny ViT: patches, attention, norms, adapter, dispatcher, MLP of CLS and active tokens."""
    n = patches + 1
    macs = patches * C * 16 * 16 * 3
    for k in active:
        macs += 4 * n * C**2 + 2 * n**2 * C + 5 * n * C
        macs += adapted * (n * 2 * C * BOTTLENECK + patches * C)
        macs += (1 + k) * (2 * C * HIDDEN + 5 * C)
    return macs


# 72 x 96: the backbone pads to whole patches; sliding: 2 and 2 x 2 windows, and batches of several images
@pytest.mark.parametrize('test_cfg', [WHOLE, SLIDE])
@pytest.mark.parametrize('shapes', [[(1, 64, 96)], [(2, 64, 96), (1, 72, 96), (3, 64, 64)]])
def test_counts_are_those_of_the_operators_that_ran(tiny_model_cfg, test_cfg, shapes):
    model = build(tiny_model_cfg | dict(test_cfg=test_cfg))
    batches = [torch.randn(images, 3, height, width) for images, height, width in shapes]
    report = evaluate(model, *batches)
    images = sum(len(batch) for batch in batches)
    ran = sum(count_macs(lambda b=batch: model.predict(b)) for batch in batches)
    assert report['gmacs'] * images * 1e9 == pytest.approx(ran, rel=1e-12)
    decoder = report['gmacs'] - report['gmacs_backbone']
    assert decoder > 0 and decoder == pytest.approx(report['gmacs_dense'] - report['gmacs_backbone_dense'], rel=1e-9)


def test_a_model_that_cannot_be_counted_is_refused_before_training():
    with pytest.raises(TypeError, match='model must have a mmdyt.DyTVisionTransformer as its backbone, got Linear'):
        FLOPsHook(lines=False).before_run(make_runner(nn.Linear(1, 1)))


def test_a_half_precision_model_is_counted_alike(tiny_model_cfg):
    model = build(tiny_model_cfg)
    features = tuple(torch.empty(1, 32, 4, 4) for _ in range(4))
    assert part_macs(model, features) == part_macs(model.half(), features)


MOE = dict(type='mmdyt.MoEAdapter', bottleneck=BOTTLENECK, num_experts=3)
MOE_OUTPUTS = MOE | dict(mix='outputs')


@pytest.mark.parametrize('dispatch', ['attn', 'attn_mlp', 'layer'])
@pytest.mark.parametrize(
    'adapter', [dict(bottleneck=BOTTLENECK), MOE, MOE_OUTPUTS], ids=['plain', 'moe', 'moe_outputs']
)
def test_variants_are_counted_as_the_operators_that_ran(tiny_model_cfg, dispatch, adapter):
    backbone = tiny_model_cfg['backbone'] | dict(dispatch=dispatch, adapter=adapter)
    model = build(tiny_model_cfg | dict(backbone=backbone))
    images = torch.randn(3, 3, 64, 96)
    report = evaluate(model, images)
    assert report['gmacs'] * 3 * 1e9 == pytest.approx(count_macs(lambda: model.predict(images)), rel=1e-12)
    layers = {name.removeprefix('activation_rate/') for name in report if '/' in name}
    kinds = ('_attn', '_mlp') if dispatch == 'attn_mlp' else ('',)
    assert layers == {f'layer_{i}{kind}' for i in range(LAYERS) for kind in kinds}


@pytest.mark.parametrize(('test_cfg', 'windows', 'patches'), [(WHOLE, 1, 24), (SLIDE, 2, 16)])
def test_backbone_follows_the_masks(tiny_model_cfg, test_cfg, windows, patches):
    model = build(tiny_model_cfg | dict(test_cfg=test_cfg))
    masks = []  # of each window and layer, in the order in which they run
    for branch in dynamic_branches(model).values():
        branch.dispatcher.register_forward_hook(lambda module, args, dispatch: masks.append(dispatch.mask[:, 1:]))
    report = evaluate(model, torch.randn(1, 3, 64, 96), torch.randn(1, 3, 64, 96))
    assert len(masks) == 2 * windows * LAYERS
    passes = [[float(mask.sum()) for mask in masks[i : i + LAYERS]] for i in range(0, len(masks), LAYERS)]
    assert len({tuple(active) for active in passes}) > 1
    expected = sum(macs_by_hand(patches, active) for active in passes) / 2
    assert report['gmacs_backbone'] * 1e9 == pytest.approx(expected, rel=1e-12)
    dense = windows * macs_by_hand(patches, [patches] * LAYERS, adapted=False)
    assert report['gmacs_backbone_dense'] * 1e9 == pytest.approx(dense, rel=1e-12)
    for i in range(LAYERS):
        rate = sum(active[i] for active in passes) / (len(passes) * patches)
        assert report[f'activation_rate/layer_{i}'] == pytest.approx(rate)
    rates = [report[f'activation_rate/layer_{i}'] for i in range(LAYERS)]
    assert report['activation_rate'] == pytest.approx(sum(rates) / LAYERS)


def test_views_are_summed(tiny_model_cfg):
    tta = MODELS.build(dict(type='mmseg.SegTTAModel', module=tiny_model_cfg)).eval()
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    meta = dict(
        ori_shape=(64, 96), img_shape=(64, 96), pad_shape=(64, 96), flip=False, flip_direction=None, img_path='x'
    )
    flipped = meta | dict(flip=True, flip_direction='horizontal')
    batch = dict(
        inputs=[[image], [image.flip(2)]],
        data_samples=[[SegDataSample(metainfo=meta)], [SegDataSample(metainfo=flipped)]],
    )
    hook, runner, metrics = FLOPsHook(lines=False), make_runner(tta), {}
    hook.before_test_epoch(runner)
    with torch.no_grad():
        outputs = tta.test_step(batch)
    hook.after_test_iter(runner, 0, batch, outputs)
    hook.after_test_epoch(runner, metrics)
    assert len(outputs) == 1
    assert metrics['gmacs'] * 1e9 == pytest.approx(count_macs(lambda: tta.test_step(batch)), rel=1e-12)
    assert runner.message_hub.scalars == {f'test/{name}': value for name, value in metrics.items()}


def test_masked_inference_skips_nothing(tiny_model_cfg):
    model, images = build(tiny_model_cfg), torch.randn(2, 3, 64, 64)
    packed = evaluate(model, images)
    for branch in dynamic_branches(model).values():
        branch.inference = 'masked'
    masked = evaluate(model, images)
    assert packed['activation_rate'] == masked['activation_rate'] < 1
    assert masked['gmacs_backbone'] * 1e9 == pytest.approx(macs_by_hand(16, [16] * LAYERS), rel=1e-12)
    assert masked['gmacs'] * 2e9 == pytest.approx(count_macs(lambda: model.predict(images)), rel=1e-12)


def test_the_complete_model_skips_nothing(tiny_model_cfg):
    """Nor does it ask its dispatchers, whose C multiply-adds a patch it is not billed for."""
    model, images = build(tiny_model_cfg), torch.randn(1, 3, 64, 64)
    with complete_model(model):
        report = evaluate(model, images)
        counted = count_macs(lambda: model.predict(images))
    assert report['activation_rate'] == 1
    gates = LAYERS * 16 * C
    assert report['gmacs_backbone'] * 1e9 == pytest.approx(macs_by_hand(16, [16] * LAYERS) - gates, rel=1e-12)
    assert report['gmacs'] * 1e9 == pytest.approx(counted, rel=1e-12)


def test_images_of_another_thread_do_not_count(tiny_model_cfg):
    model, images = build(tiny_model_cfg), torch.randn(1, 3, 64, 64)
    expected = evaluate(model, images)
    with CostCounter(model) as counter, torch.no_grad():
        with ThreadPoolExecutor() as threads:
            threads.submit(model.predict, images).result()
        counter.add_images(len(model.predict(images)))
    assert counter.report() == expected


def test_with_gradients_inference_skips_nothing(tiny_model_cfg):
    """Saliency maps run the masked executor: rates are of the decisions, costs of what ran."""
    model, images = build(tiny_model_cfg), torch.randn(2, 3, 64, 64)
    packed, hook, runner, report = evaluate(model, images), FLOPsHook(lines=False), make_runner(model), {}
    hook.before_val_epoch(runner)
    hook.after_val_iter(runner, 0, outputs=model.predict(images))
    hook.after_val_epoch(runner, report)
    assert packed['activation_rate'] == report['activation_rate'] < 1
    assert report['gmacs_backbone'] * 1e9 == pytest.approx(macs_by_hand(16, [16] * LAYERS), rel=1e-12)
    assert packed['gmacs_backbone'] < report['gmacs_backbone']


def test_auxiliary_head_is_not_counted(tiny_model_cfg):
    images = torch.randn(1, 3, 64, 64)
    model = build(tiny_model_cfg)
    with_head = evaluate(model, images)
    model.auxiliary_head = None
    assert evaluate(model, images) == with_head


def test_neck_and_head_by_hand(tiny_model_cfg):
    norm_cfg = dict(type='SyncBN')  # has no kernel on the CPU, but counts
    head = dict(type='mmseg.FCNHead', in_channels=C, in_index=1, channels=16, num_convs=2, kernel_size=3, num_classes=3)
    head |= dict(concat_input=True, norm_cfg=norm_cfg)
    neck = dict(type='mmseg.Feature2Pyramid', embed_dim=C, rescales=[4, 2, 1, 0.5], norm_cfg=norm_cfg)
    host = SimpleNamespace(neck=MODELS.build(neck), decode_head=MODELS.build(head))
    features = tuple(torch.zeros(2, C, 4, 6) for _ in range(4))  # counted for one image, whatever the batch
    # transposed convolutions of 2 x 2: each input pixel meets 4 C x C weights; x4 has a second one at twice the size
    deconvolution = 4 * C * C
    neck_macs = (4 * 6 + 8 * 12) * deconvolution + 4 * 6 * deconvolution
    # on level 1, 8 x 12: conv 3 x 3 to 16, conv 3 x 3 of 16, conv 3 x 3 of input and output, 1 x 1 to 3 classes
    head_macs = 8 * 12 * (9 * C * 16 + 9 * 16 * 16 + 9 * (C + 16) * 16 + 16 * 3)
    assert part_macs(host, features) == dict(neck=neck_macs, head=head_macs)
    del host.neck
    assert part_macs(host, features) == dict(neck=0, head=head_macs // 4)  # level 1 is 4 x 6 then
    assert next(host.decode_head.parameters()).device.type == 'cpu'


def test_an_evaluation_that_was_cut_short_does_not_count(tiny_model_cfg):
    model, images = build(tiny_model_cfg), torch.randn(1, 3, 64, 64)
    expected = evaluate(model, images)
    hook, runner, metrics = FLOPsHook(lines=False), make_runner(model), {}
    for _ in range(2):
        hook.before_val_epoch(runner)
        with torch.no_grad():
            outputs = model.predict(images)
        hook.after_val_iter(runner, 0, outputs=outputs)
    hook.after_val_epoch(runner, metrics)
    assert metrics == expected
    assert runner.message_hub.scalars == {f'val/{name}': value for name, value in metrics.items()}


def test_the_log_says_what_is_counted(tiny_model_cfg, caplog):
    with caplog.at_level(logging.INFO, logger='flops'):
        report = evaluate(build(tiny_model_cfg), torch.randn(1, 3, 64, 64))
    (message,) = caplog.messages
    assert message.startswith(f'Activation rate {report["activation_rate"]:.3f} (target 0.50), by layer ')
    assert message.endswith('These are MACs (papers print them as FLOPs).')


def test_a_model_without_dispatchers_is_refused():
    with pytest.raises(TypeError, match='model must have a mmdyt.DyTVisionTransformer as its backbone, got Linear'):
        find_host(nn.Linear(1, 1))


def test_baselines_without_dispatchers_have_counts_and_no_rates(tiny_model_cfg, caplog):
    tiny_model_cfg.backbone.dispatcher = None
    model = build(tiny_model_cfg)
    with caplog.at_level(logging.INFO, logger='flops'):
        metrics = evaluate(model, torch.randn(2, 3, 64, 64))
    assert all(name.startswith('gmacs') for name in metrics)
    adapters = LAYERS * 17 * 2 * C * BOTTLENECK
    assert (metrics['gmacs_backbone'] - metrics['gmacs_backbone_dense']) * 1e9 == pytest.approx(adapters)
    assert caplog.messages[-1].startswith('GMACs per image: ')
