"""Dynamic Tuning in mmpretrain: all losses, and what they cost in gradients."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.registry import DefaultScope
from test_vit import TINY, spread_masks

import mmdyt.models.classifier  # noqa: F401  registers
from mmdyt.core.observe import complete_model, dynamic_branches, record_dispatch

# isort: split
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample, MultiTaskDataSample


def build(backbone=None, **options):
    torch.manual_seed(0)
    backbone = dict(type='mmdyt.DyTVisionTransformer', arch=TINY, img_size=32, patch_size=8) | (backbone or {})
    head = options.pop('head', dict(type='VisionTransformerClsHead', num_classes=5, in_channels=32))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(dict(type='mmdyt.DyTImageClassifier', backbone=backbone, head=head, **options))
    if hasattr(model.head, 'layers'):
        nn.init.normal_(model.head.layers.head.weight)
    spread_masks(model)
    for branch in dynamic_branches(model).values():
        branch.adapter.dropout.p = 0.0
    return model.train()


def batch(size=4):
    torch.manual_seed(1)
    return torch.randn(size, 3, 32, 32), [DataSample().set_gt_label(i % 5) for i in range(size)]


def losses_of(model, seed=2):
    inputs, samples = batch()
    torch.manual_seed(seed)
    return model.loss(inputs, samples)


def test_the_papers_losses_are_the_defaults_and_follow_the_equations():
    """L = CE + CE(complete) + KL(complete -> dynamic) + 2 (rate - r)^2, written out."""
    model = build(target_rate=0.3)
    losses = losses_of(model)
    inputs, samples = batch()
    labels = torch.cat([sample.gt_label for sample in samples])
    torch.manual_seed(2)
    with record_dispatch(model) as record:
        student = model.head(model.backbone(inputs))
    with complete_model(model):
        teacher = model.head(model.backbone(inputs))
    rate = torch.cat([d.patch_mask.flatten() for d in record.flat()]).mean()
    expected = dict(
        loss=F.cross_entropy(student, labels),
        loss_rate=2.0 * (rate - 0.3) ** 2,
        loss_distill=F.kl_div(
            student.log_softmax(1), teacher.detach().log_softmax(1), reduction='batchmean', log_target=True
        ),
        activation_rate=rate,
    ) | {'complete.loss': F.cross_entropy(teacher, labels)}
    assert set(losses) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)
    total, logged = model.parse_losses(losses)
    parts = [value for name, value in expected.items() if 'loss' in name]
    torch.testing.assert_close(total, sum(parts))
    assert logged['activation_rate'] == pytest.approx(rate.item())
    names, tuned = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    got, want = torch.autograd.grad(total, tuned), torch.autograd.grad(sum(parts), tuned)
    for name, g, w in zip(names, got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6, msg=name)


def test_the_cheap_executor_has_the_gradients_of_the_masked_one():
    grads = []
    for training in ('split', 'masked'):
        model = build(backbone=dict(training=training)).double()
        inputs, samples = batch()
        torch.manual_seed(2)
        total, _ = model.parse_losses(model.loss(inputs.double(), samples))
        grads.append(torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad]))
    assert all(torch.allclose(s, m, rtol=1e-9, atol=1e-12) for s, m in zip(*grads, strict=True))
    assert [b.training_executor for b in dynamic_branches(build()).values()] == ['split'] * 3


@pytest.mark.parametrize('backbone', [dict(drop_path_rate=0.1), dict(dispatch='attn'), dict(dispatch='layer')])
def test_branches_that_mix_tokens_or_drop_images_train_masked(backbone):
    branches = list(dynamic_branches(build(backbone=backbone)).values())
    assert branches[-1].training_executor == 'masked'


@pytest.mark.parametrize('weights', [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (2.0, 3.0)])
def test_each_loss_is_switched_and_weighted(weights):
    full = losses_of(build())
    passes = []
    model = build(complete_weight=weights[0], distill_weight=weights[1])
    model.backbone.register_forward_hook(lambda module, args, output: passes.append(output[0].requires_grad))
    losses = losses_of(model)
    assert len(passes) == 1 + any(weights)
    for name, weight in zip(('complete.loss', 'loss_distill'), weights, strict=True):
        assert (name in losses) == bool(weight)
        if weight:
            torch.testing.assert_close(losses[name], weight * full[name])
    if weights == (0.0, 0.5):
        assert passes == [True, False]  # a teacher that is not trained needs no gradient


def test_dispatchers_do_not_run_in_the_complete_model():
    model = build()
    losses = losses_of(model)
    complete = torch.autograd.grad(losses['complete.loss'], model.head.layers.head.weight, retain_graph=True)[0]
    assert complete.abs().sum() > 0
    gates = [branch.dispatcher.gate.weight for branch in dynamic_branches(model).values()]
    assert torch.autograd.grad(losses['complete.loss'], gates, allow_unused=True, retain_graph=True) == (None,) * 3
    assert torch.autograd.grad(losses['loss_distill'], gates[:-1])[0].abs().sum() > 0


def test_a_head_without_logits_trains_without_distillation_and_is_named_with_it():
    tasks = dict(a=dict(type='LinearClsHead', num_classes=5, in_channels=32))
    head = dict(type='MultiTaskHead', task_heads=tasks, in_channels=32)
    inputs, _ = batch()
    samples = [MultiTaskDataSample() for _ in inputs]
    for i, sample in enumerate(samples):
        sample.set_field(DataSample().set_gt_label(i % 5), 'a')
    losses = build(head=head, distill_weight=0.0).loss(inputs, samples)
    assert 'loss_rate' in losses and any(name.startswith('complete.') for name in losses)
    with pytest.raises(ValueError, match='distill_weight must be 0 with a MultiTaskHead, whose training pass shows no'):
        build(head=head).loss(inputs, samples)


def test_without_dispatchers_the_losses_are_the_hosts():
    model = build(backbone=dict(dispatcher=None))
    losses = losses_of(model)
    assert set(losses) == {'loss'}


def test_predicts_as_the_stock_classifier_does():
    model = build().eval()
    inputs, samples = batch()
    with torch.no_grad():
        predicted = model.predict(inputs, samples)
        scores = model.head(model.backbone(inputs)).softmax(1)
    assert [p.pred_label.item() for p in predicted] == scores.argmax(1).tolist()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(target_rate=50), r'target_rate must lie in \(0, 1\], got 50\. Rates are fractions, not percent'),
        (dict(target_rate=0), r'target_rate must lie in \(0, 1\], got 0'),
        (dict(rate_weight=-1), 'rate_weight must be at least 0, got -1'),
        (dict(complete_weight=-1), 'complete_weight must be at least 0, got -1'),
        (dict(distill_weight=float('nan')), 'distill_weight must be at least 0, got nan'),
        (dict(backbone=dict(adapter=False)), 'adapter must be a config or None, got False'),
        (dict(backbone=dict(dispatcher='random')), "dispatcher must be a config or None, got 'random'"),
        (dict(backbone=dict(dispatcher=None, adapter=None, training='x')), "training must be one of .*, got 'x'"),
        (dict(backbone=dict(dispatcher=None, adapter=None, inference='x')), "inference must be one of .*, got 'x'"),
        (dict(backbone=dict(skip_unread='no')), "skip_unread must be True or False, got 'no'"),
        (dict(backbone=dict(adapter=dict(scale='x'))), "scale must be a finite number, got 'x'"),
        (dict(backbone=dict(dispatcher=dict(tau='5'))), "tau must be a positive number, got '5'"),
        (
            dict(target_rate=0.7, backbone=dict(dispatcher=dict(type='mmdyt.RandomDispatcher', rate=0.5))),
            r'target_rate must be the rate 0\.5 of backbone\.layers\.0\.dynamic\.mlp\.dispatcher, got 0\.7',
        ),
        (
            dict(head=dict(type='MultiLabelLinearClsHead', num_classes=5, in_channels=32)),
            'distill_weight must be 0 with a MultiLabelLinearClsHead, got 1.0',
        ),
        (
            dict(head=dict(type='LinearClsHead', num_classes=1, in_channels=32)),
            'distill_weight must be 0 with one class, whose probability is always 1, got 1.0 with a LinearClsHead',
        ),
        (dict(backbone=dict(dispatch='mpl')), "dispatch must be one of .*, got 'mpl'"),
        (dict(backbone=dict(adapter=dict(bottleneck=0))), 'bottleneck must be a positive integer, got 0'),
        (dict(backbone=dict(adapter=dict(type='mmdyt.MoEAdapter', num_experts=0))), 'num_experts must be a positive'),
        (dict(data_preprocessor=dict(type='mmdyt.ImagePreprocessor', normalization='zero')), 'normalization must be'),
    ],
)
def test_mistakes_are_refused_in_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize(('name', 'mean'), [('half', 127.5), ('imagenet', 123.675)])
def test_normalization_is_a_named_switch(name, mean):
    model = build(data_preprocessor=dict(type='mmdyt.ImagePreprocessor', normalization=name))
    image = torch.full((3, 32, 32), 0, dtype=torch.uint8)
    image[2] = 255  # BGR as loaded: the red channel
    out = model.data_preprocessor(dict(inputs=[image], data_samples=[DataSample()]))['inputs']
    std = {'half': 127.5, 'imagenet': 58.395}[name]
    torch.testing.assert_close(out[0, 0], torch.full((32, 32), (255 - mean) / std))
