"""Dynamic Tuning in mmaction2: losses, views, stock heads, and that a clip's scores depend on that clip alone."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.registry import DefaultScope
from test_vit import TINY

import mmdyt.models.recognizer  # noqa: F401  registers
from mmdyt.core.observe import complete_model, record_dispatch

# isort: split
from mmaction.registry import MODELS
from mmaction.structures import ActionDataSample

T, K = 4, 5
HEAD = dict(type='TimeSformerHead', num_classes=K, in_channels=32, topk=(1,), average_clips='score')
I3D = dict(type='I3DHead', num_classes=K, in_channels=32, dropout_ratio=0.0, topk=(1,), average_clips='score')
NECK = dict(type='mmdyt.ClipNeck', in_channels=32, aggregator=dict(num_heads=2))


def build(backbone=None, neck=NECK, head=None, aggregator=None, **options):
    """A tiny recognizer, all that is tuned away from its start: dispatchers choose different tokens in every frame."""
    torch.manual_seed(0)
    defaults = dict(type='mmdyt.DyTVisionTransformer', arch=TINY, img_size=32, patch_size=8, out_type='raw')
    neck = neck and neck | dict(aggregator=neck['aggregator'] | (aggregator or {}))
    with DefaultScope.overwrite_default_scope('mmaction'):
        model = MODELS.build(
            dict(
                type='mmdyt.DyTRecognizer',
                backbone=defaults | (backbone or {}),
                neck=neck,
                cls_head=HEAD | (head or {}),
                data_preprocessor=dict(type='ActionDataPreprocessor', format_shape='NCTHW'),
            )
            | options
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=1.0 if 'dispatcher' in name else 0.3)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batch(size=3, views=1):
    torch.manual_seed(1)
    samples = [ActionDataSample().set_gt_label(i % K) for i in range(size)]
    return torch.randn(size, views, 3, T, 32, 32), samples


def scores(model, inputs) -> torch.Tensor:
    """(B, K), as predicted."""
    samples = [ActionDataSample().set_gt_label(0) for _ in inputs]
    with torch.no_grad():
        return torch.stack([sample.pred_score for sample in model.eval().predict(inputs, samples)])


def test_the_papers_losses_are_the_defaults_and_follow_the_equations():
    """L = CE + CE(complete) + KL(complete -> dynamic) + 2 (rate - r)^2, written out, frames folded by hand."""
    model = build(target_rate=0.3).train()
    inputs, samples = batch()
    labels = torch.tensor([0, 1, 2])

    def forward():
        frames = torch.stack([inputs[b, 0, :, t] for b in range(3) for t in range(T)])
        (tokens,) = model.backbone(frames)
        return model.cls_head(model.neck.aggregator(tokens.view(3, T, *tokens.shape[1:])))

    torch.manual_seed(2)
    losses = model.loss(inputs, samples)
    torch.manual_seed(2)
    with record_dispatch(model) as record:
        student = forward()
    with complete_model(model):
        teacher = forward()
    rate = torch.cat([d.patch_mask.flatten() for d in record.flat()]).mean()
    expected = dict(
        loss_cls=F.cross_entropy(student, labels),
        loss_rate=2.0 * (rate - 0.3) ** 2,
        loss_distill=F.kl_div(
            student.log_softmax(1), teacher.detach().log_softmax(1), reduction='batchmean', log_target=True
        ),
        activation_rate=rate,
    ) | {'complete.loss_cls': F.cross_entropy(teacher, labels)}
    assert set(losses) == {*expected, 'top1_acc', 'complete.top1_acc'}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)
    total, _ = model.parse_losses(losses)
    torch.testing.assert_close(total, sum(value for name, value in expected.items() if 'loss' in name))


def test_everything_new_is_tuned_and_the_base_is_frozen():
    model = build(aggregator=dict(temporal_positions=T)).train()
    total, _ = model.parse_losses(model.loss(*batch()))
    total.backward()
    for name, parameter in model.named_parameters():
        new = '.dynamic.' in name or not name.startswith('backbone.')
        assert parameter.requires_grad == new, name
        assert (parameter.grad is not None) == new, name


MOE = dict(type='mmdyt.MoEAdapter', bottleneck=4)


@pytest.mark.parametrize(
    'backbone',
    [
        dict(),
        dict(adapter=MOE),
        dict(adapter=MOE | dict(frames_per_clip=T)),
        dict(dispatch='attn'),
        dict(dispatch='attn_mlp'),
        dict(dispatch='layer'),
    ],
    ids=['mlp', 'moe', 'moe_per_clip', 'attn', 'attn_mlp', 'layer'],
)
def test_packed_equals_masked_for_clips(backbone):
    results, inputs = [], batch(views=2)[0]
    for inference in ('packed', 'masked'):
        model = build(backbone=backbone | dict(inference=inference))
        with record_dispatch(model) as record:
            results.append(scores(model, inputs))
        rates = [dispatch.patch_mask.mean().item() for dispatch in record.flat()]
        assert any(0 < rate < 1 for rate in rates)
    assert results[0].std() > 0.1
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_without_temporal_positions_shuffled_frames_give_the_same_logits():
    inputs = batch()[0]
    order = torch.tensor([2, 0, 3, 1])
    model = build()
    torch.testing.assert_close(scores(model, inputs[:, :, :, order]), scores(model, inputs), rtol=0, atol=1e-5)
    temporal = build(aggregator=dict(temporal_positions=T))
    assert (scores(temporal, inputs[:, :, :, order]) - scores(temporal, inputs)).abs().max() > 1e-2


def test_temporal_positions_are_trained_and_then_the_order_of_frames_matters():
    model = build(aggregator=dict(temporal_positions=T))
    nn.init.zeros_(model.neck.aggregator.temporal_positions)
    inputs, samples = batch()
    backwards = inputs.flip(3)
    torch.testing.assert_close(scores(model, backwards), scores(model, inputs), rtol=0, atol=1e-5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        loss, _ = model.parse_losses(model.train().loss(inputs, samples))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (scores(model, backwards) - scores(model, inputs)).abs().max() > 1e-3


@pytest.mark.parametrize('head', ['aggregated', 'stock'])
@pytest.mark.parametrize('at_once', [1, 2, 4, 100])
def test_a_clip_depends_neither_on_batch_mates_nor_on_max_testing_views(head, at_once):
    options = dict() if head == 'aggregated' else dict(neck=None, head=I3D, backbone=dict(out_type='featmap'))
    inputs = batch(views=3)[0]
    together = scores(build(**options), inputs)
    model = build(test_cfg=dict(max_testing_views=at_once), **options)
    torch.testing.assert_close(scores(model, inputs), together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores(model, inputs[1:2]), together[1:2], rtol=1e-4, atol=1e-5)


def test_max_testing_views_runs_no_more_views_at_once():
    sizes = []
    model = build(test_cfg=dict(max_testing_views=2))
    model.backbone.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[:3])))
    scores(model, batch(views=3)[0])
    assert sizes == [(2, 3, T)] * 4 + [(1, 3, T)]


@pytest.mark.parametrize('average', ['score', 'prob', None])
def test_views_are_averaged_as_the_head_says(average):
    inputs = batch(views=3)[0]
    single = scores(build(head=dict(average_clips='score')), inputs.flatten(0, 1)[:, None]).view(3, 3, K)
    expected = dict(score=single.mean(1), prob=single.softmax(2).mean(1)).get(average, single)
    got = scores(build(head=dict(average_clips=average)), inputs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('out_type', 'shape'),
    [('featmap', (32, T, 4, 4)), ('cls_token', (32, T, 1, 1)), ('avg_featmap', (32, T, 1, 1)), ('raw', (T, 17, 32))],
)
def test_the_backbone_returns_what_3d_recognizers_expect(out_type, shape):
    model = build(neck=None, head=I3D, backbone=dict(out_type=out_type)).eval()
    clips = batch()[0][:, 0]
    with torch.no_grad():
        (features,) = model.backbone(clips)
        (frame,) = model.backbone(clips[1, :, 2][None])
    assert features.shape == (3, *shape)
    got = features[1, 2] if out_type == 'raw' else features[1, :, 2]
    torch.testing.assert_close(got.reshape(frame[0].shape), frame[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('out_type', ['featmap', 'cls_token', 'avg_featmap'])
def test_mmaction2s_head_for_clips_trains_with_every_loss(out_type):
    model = build(neck=None, head=I3D, backbone=dict(out_type=out_type)).train()
    losses = model.loss(*batch())
    assert {'loss_cls', 'complete.loss_cls', 'loss_distill', 'loss_rate'} < set(losses)
    model.parse_losses(losses)[0].backward()
    assert model.backbone.layers[0].dynamic['mlp'].adapter.down.weight.grad.abs().sum() > 0


def test_only_a_class_token_head_leaves_something_unread():
    short = build(neck=None, head=I3D, backbone=dict(out_type='cls_token', skip_unread=True))
    whole = build(neck=None, head=I3D, backbone=dict(out_type='cls_token'))
    inputs = batch(views=2)[0]
    torch.testing.assert_close(scores(short, inputs), scores(whole, inputs), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="skip_unread must be False unless out_type is 'cls_token'"):
        build(backbone=dict(skip_unread=True))


@pytest.mark.parametrize('stage', ['backbone', 'neck', 'head'])
def test_extract_feat_returns_the_stage_that_was_asked_for(stage):
    model = build().eval()
    inputs, samples = batch(views=2)
    with torch.no_grad():
        features, arguments = model.extract_feat(inputs, stage=stage, data_samples=samples)
        logits = model(inputs, stage=stage)
    assert features.shape == dict(backbone=(6, T, 17, 32), neck=(6, 32), head=(6, K))[stage]
    assert arguments == dict(loss_aux={})
    torch.testing.assert_close(logits, features)


def test_losses_of_a_neck_are_added():
    model = build().train()
    forward = model.neck.forward
    model.neck.forward = lambda x, data_samples=None: (
        forward(x)[0],
        dict(loss_neck=torch.tensor(float(len(data_samples)))),
    )
    assert model.loss(*batch())['loss_neck'] == 3


def test_scores_are_single_precision_under_any_autocast():
    model, (inputs, samples) = build(), batch()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = model.train().loss(inputs, samples)
        assert scores(model, inputs).dtype == torch.float32
    assert losses['loss_cls'].dtype == torch.float32 and losses['top1_acc'] >= 0


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(backbone=dict(out_indices=(0, 2))), r'out_indices must name one layer .* for a recognizer, got \[0, 2\]'),
        (dict(data_preprocessor=dict(type='ActionDataPreprocessor')), "format_shape must be 'NCTHW' .*, got 'NCHW'"),
        (dict(head=dict(multi_class=True)), 'distill_weight must be 0 with a head of multi_class=True, got 1.0'),
        (dict(head=dict(num_classes=1)), 'distill_weight must be 0 with one class, whose .*, got 1.0'),
        (dict(test_cfg=dict(max_testing_views=0)), 'max_testing_views must be a positive integer in test_cfg, got 0'),
        (dict(test_cfg=dict(max_testing_views='2')), "max_testing_views must be a positive .*, got '2'"),
        (dict(test_cfg=dict(fcn_test=True)), 'fcn_test must be False in test_cfg, got True'),
        (
            dict(head=dict(type='TSNHead')),
            'cls_head must be a head of 3D recognizers, got TSNHead, which wants num_segs',
        ),
        (dict(cls_head=None), 'cls_head must be a head of mmaction2, got none'),
        (dict(target_rate=50), r'target_rate must lie in \(0, 1\], got 50'),
    ],
)
def test_mistakes_are_refused_in_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_images_are_refused_as_clips():
    with pytest.raises(
        ValueError, match=r'inputs must be clips \(B, views, C, T, H, W\), got shape \(2, 8, 3, 32, 32\)'
    ):
        build().extract_feat(torch.zeros(2, 8, 3, 32, 32))


def test_clips_that_a_moe_adapter_would_mix_are_refused():
    model = build(backbone=dict(adapter=MOE | dict(frames_per_clip=2 * T)))
    with pytest.raises(ValueError, match=f'frames_per_clip must be 1 or the {T} frames of a clip, got {2 * T}'):
        scores(model, batch(size=2)[0])


def test_double_precision_stays():
    assert scores(build().double(), batch()[0].double()).dtype == torch.float64
