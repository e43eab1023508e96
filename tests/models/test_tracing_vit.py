"""Whole models with capacities are exported and compiled as one static graph, for any number of images."""

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from static_graphs import export_any_batch, not_static
from tiny_configs import TINY_ARCH, TINY_CLS_CONFIG, TINY_CONFIG

import mmdyt.models.classifier
import mmdyt.models.segmentor  # noqa: F401  repairs the wheels, registers
from mmdyt.core.fit.calibrate import token_dispatchers

VARIANTS = [('mlp', 'active'), *((d, keys) for d in ('attn', 'attn_mlp', 'layer') for keys in ('active', 'all'))]
TASKS = dict(cls=(TINY_CLS_CONFIG, 'mmpretrain', (32, 32)), seg=(TINY_CONFIG, 'mmseg', (64, 96)))
QUICK = [
    pytest.param(task, *variant, marks=[pytest.mark.slow] if task == 'seg' and variant not in VARIANTS[::6] else [])
    for task in TASKS
    for variant in VARIANTS
]


def build(task, tmp_path, **backbone):
    """A tiny model of a task with capacities, and images of its size."""
    text, scope, size = TASKS[task]
    (tmp_path / 'config.py').write_text(text.format(root=ROOT, arch=TINY_ARCH, data=tmp_path, pretrained=''))
    cfg = Config.fromfile(tmp_path / 'config.py', import_custom_modules=False).model
    cfg.backbone.update(backbone, init_cfg=None)
    init_default_scope(scope)
    torch.manual_seed(0)
    model = MODELS.build(cfg).eval()
    for dispatcher in token_dispatchers(model).values():
        torch.nn.init.normal_(dispatcher.gate.weight)
        dispatcher.set_rule(0.0, 0.5)
    return model, torch.randn(5, 3, *size)


@pytest.mark.parametrize(('task', 'dispatch', 'keys'), QUICK)
def test_models_with_capacities_are_exported_statically(tmp_path, task, dispatch, keys):
    model, images = build(task, tmp_path, dispatch=dispatch, keys=keys)
    with torch.no_grad():
        program = export_any_batch(model, torch.zeros_like(images[:2]))
        assert not_static(program) == []
        run = program.module()
        for batch in (images, images[:1]):
            torch.testing.assert_close(run(batch), model(batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize(('task', 'dispatch', 'keys'), QUICK)
def test_models_with_capacities_are_compiled_as_one_graph(tmp_path, task, dispatch, keys):
    model, images = build(task, tmp_path, dispatch=dispatch, keys=keys)
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True, backend='eager')
    with torch.no_grad():
        for batch in (images, images[:2], images[:1]):
            torch.testing.assert_close(run(batch), model(batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    'backbone',
    [
        dict(skip_unread=True),
        dict(substitute=dict(type='mmdyt.MeanUpdate')),
        dict(parts=[dict(type='mmdyt.Prompts', length=2)]),
        dict(adapter=dict(type='mmdyt.MoEAdapter', bottleneck=4)),
    ],
    ids=lambda backbone: next(iter(backbone)),
)
def test_parts_are_exported_for_any_number_of_images(tmp_path, backbone):
    model, images = build('cls', tmp_path, dispatch='layer', keys='all', **backbone)
    with torch.no_grad():
        program = export_any_batch(model, torch.zeros_like(images[:2]))
        assert not_static(program) == []
        for batch in (images, images[:1]):
            torch.testing.assert_close(program.module()(batch), model(batch), rtol=0, atol=1e-5)
