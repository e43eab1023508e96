"""FLOPsHook and tools/get_flops.py for video: what is counted per clip and per view is what the operators ran."""

import json
import logging
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.registry import MODELS, DefaultScope
from test_flops import make_runner

import mmdyt.models.recognizer  # noqa: F401  registers
from mmdyt.core.macs import count_macs
from mmdyt.core.observe import dynamic_branches
from mmdyt.engine.flops import FLOPsHook

# isort: split
from mmaction.structures import ActionDataSample

T, C, K = 4, 32, 5
ARCH = dict(embed_dims=C, num_layers=3, num_heads=2, feedforward_channels=64)
AGGREGATED = dict(
    neck=dict(type='mmdyt.ClipNeck', in_channels=C, aggregator=dict(num_heads=2)),
    cls_head=dict(type='TimeSformerHead', num_classes=K, in_channels=C, average_clips='score'),
)
STOCK = dict(cls_head=dict(type='I3DHead', num_classes=K, in_channels=C, average_clips='score'))
MOE = dict(type='mmdyt.MoEAdapter', bottleneck=4)


def build(host, **backbone) -> nn.Module:
    torch.manual_seed(0)
    vit = dict(type='mmdyt.DyTVisionTransformer', arch=ARCH, img_size=32, patch_size=8, out_type='raw') | backbone
    preprocessor = dict(type='ActionDataPreprocessor', format_shape='NCTHW')
    with DefaultScope.overwrite_default_scope('mmaction'):
        model = MODELS.build(
            dict(type='mmdyt.DyTRecognizer', backbone=vit, data_preprocessor=preprocessor) | host
        ).eval()
    for branch in dynamic_branches(model).values():
        nn.init.normal_(branch.dispatcher.gate.weight)
    return model


def predict(model: nn.Module, clips: torch.Tensor) -> list:
    with torch.no_grad():
        return model.predict(clips, [ActionDataSample().set_gt_label(0) for _ in clips])


def evaluate(model: nn.Module, *batches: torch.Tensor) -> dict[str, float]:
    """What the hook adds to the metrics when the model predicts some batches (B, views, 3, T, H, W)."""
    hook, runner, metrics = FLOPsHook(lines=False), make_runner(model), {}
    hook.before_val_epoch(runner)
    for i, clips in enumerate(batches):
        hook.after_val_iter(runner, i, outputs=predict(model, clips))
    hook.after_val_epoch(runner, metrics)
    assert not model.backbone._forward_hooks
    return metrics


def plain_attention(query, key, value, attn_mask=None, dropout_p=0.0):
    """Fused attention as the matrix products that it stands for."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float('-inf'))
    return scores.softmax(dim=-1) @ value


@pytest.mark.parametrize('views_at_once', [None, 2])
@pytest.mark.parametrize(
    ('host', 'backbone'),
    [
        (AGGREGATED, dict()),
        (AGGREGATED, dict(dispatch='attn_mlp')),
        (AGGREGATED, dict(adapter=MOE)),
        (AGGREGATED | dict(neck=AGGREGATED['neck'] | dict(adapter=MOE)), dict(adapter=None, dispatcher=None)),
        (STOCK, dict(out_type='featmap')),
        (STOCK, dict(out_type='cls_token', skip_unread=True)),
    ],
    ids=['mlp', 'attn_mlp', 'moe', 'moe_neck', 'stock_head', 'skip_unread'],
)
def test_counts_are_those_of_plain_matrix_products(monkeypatch, host, backbone, views_at_once):
    model = build(host | dict(test_cfg=dict(max_testing_views=views_at_once)), **backbone)
    batches = [torch.randn(2, 3, 3, T, 32, 32), torch.randn(1, 3, 3, T, 32, 48)]
    report = evaluate(model, *batches)
    with monkeypatch.context() as patch:
        patch.setattr(F, 'scaled_dot_product_attention', plain_attention)
        for layer in model.backbone.layers:
            patch.setattr(layer.attn, 'scaled_dot_product_attention', plain_attention)
        # one by one: views that run together share the projection of the one query
        views = [view[None, None] for batch in batches for view in batch.flatten(0, 1)]
        ran = sum(count_macs(lambda v=view: predict(model, v)) for view in views)
    assert report['gmacs'] * 3 * 1e9 == pytest.approx(ran, rel=1e-12)
    assert report['views'] == 3 and report['gmacs_view'] * 3 == pytest.approx(report['gmacs'])
    assert report['gmacs_view_dense'] * 3 == pytest.approx(report['gmacs_dense'])


def test_dense_is_the_plain_vit_on_every_frame_and_the_aggregator_once_a_view():
    """The formulas: of the ViT per frame, of one query's cross-attention per view."""
    report = evaluate(build(AGGREGATED), torch.randn(2, 3, 3, T, 32, 32))
    n = 17
    layer = 4 * n * C**2 + 2 * n**2 * C + 2 * n * C * 64 + 2 * 5 * n * C
    frame = 16 * C * 8 * 8 * 3 + 3 * layer + 5 * n * C
    tokens = T * n
    aggregator = 2 * 5 * tokens * C + 5 * C + 2 * tokens * C**2 + 2 * tokens * C + 2 * C**2
    view = T * frame + aggregator + C * K
    assert report['gmacs_view_dense'] * 1e9 == pytest.approx(view, rel=1e-12)
    assert report['gmacs_dense'] * 1e9 == pytest.approx(3 * view, rel=1e-12)
    assert report['gmacs_backbone_dense'] * 1e9 == pytest.approx(3 * T * frame, rel=1e-12)


def test_the_log_says_what_a_clip_is(caplog):
    with caplog.at_level(logging.INFO, logger='flops'):
        report = evaluate(build(AGGREGATED), torch.randn(2, 3, 3, T, 32, 32))
    message, spread = caplog.messages
    assert spread == (
        f'GMACs of single samples: min {report["gmacs_min"]:.3f}, p5 {report["gmacs_p5"]:.3f}, '
        f'median {report["gmacs_median"]:.3f}, p95 {report["gmacs_p95"]:.3f}, max {report["gmacs_max"]:.3f}.'
    )
    assert f'GMACs per clip of 3 views: {report["gmacs"]:.3f} of {report["gmacs_dense"]:.3f} dense' in message
    assert f'; per view {report["gmacs_view"]:.3f} of {report["gmacs_view_dense"]:.3f}. These are MACs' in message


ROOT = Path(__file__).parents[2]


def counts(run_tool, tmp_path, *options, config='configs/dyt/vitb_k400.py'):
    file = tmp_path / 'counts.json'
    run_tool('get_flops', ROOT / config, '--json', file, *options)
    return json.loads(file.read_text())


def test_get_flops_counts_a_view_of_vitb(run_tool, tmp_path, capsys):
    """8 frames of 17.582 G less the classifier of 1000 classes (0.000768 G); aggregator and head by their formulas."""
    count = counts(run_tool, tmp_path)
    assert count['backbone']['dense_macs'] == pytest.approx(8 * (17.582e9 - 768e3), rel=1e-4)
    assert count['backbone']['macs'] == pytest.approx(8 * (12.263e9 - 768e3), rel=1e-4)
    tokens, width = 8 * 197, 768
    aggregator = 2 * tokens * (width**2 + width) + 2 * width**2 + (10 * tokens + 5) * width
    assert count['neck']['macs'] == aggregator and count['head']['macs'] == width * 400
    assert count['params']['neck'] == 2_367_744
    assert 'One view of 8 frames of 224 x 224, activation rate 0.50.' in capsys.readouterr().out
    longer = counts(run_tool, tmp_path, '--frames', 16)
    assert longer['backbone']['macs'] == 2 * count['backbone']['macs']
    folded = counts(run_tool, tmp_path, '--cfg-options', 'model.neck.aggregator.fold_projections=True')
    assert folded['neck']['macs'] < count['neck']['macs'] / 40 and folded['backbone'] == count['backbone']


@pytest.mark.parametrize(
    ('config', 'options', 'message'),
    [
        ('dyt/vitb_k400.py', ['--frames', '0'], '--frames must be at least 1, got 0.'),
        ('dyt/vitb_cifar100.py', ['--frames', '8'], '--frames must be left out for a model of images, got 8.'),
        (
            'dyt/vitb_k400.py',
            ['--cfg-options', 'test_dataloader.dataset.pipeline=[]'],
            '--frames must be set where no step of the test pipeline has a clip_len, got none.',
        ),
    ],
)
def test_get_flops_refuses(run_tool, capfd, config, options, message):
    with pytest.raises(SystemExit) as exit_info:
        run_tool('get_flops', ROOT / 'configs' / config, *options)
    assert exit_info.value.code == 2
    assert message in capfd.readouterr().err
