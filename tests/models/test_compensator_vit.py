"""The bridge between degrees of token merging in the backbone: size, cost, merging, training."""

import pytest
import torch
import torch.nn as nn
from mmengine.registry import MODELS, DefaultScope
from test_methods import arguments, build, features, images

import mmdyt.models.classifier  # noqa: F401  registers
from mmdyt.core.macs import count_macs
from mmdyt.core.observe import record_dispatch
from mmdyt.core.tuning import merge
from mmdyt.models import DyTVisionTransformer
from mmdyt.parts.bridge import bridge_state, compensators, set_degree

WAYS = [(0, 3), (3, 1), (2, 2)]


def learned(backbone):
    torch.manual_seed(1)
    for part in compensators(backbone):
        nn.init.normal_(part.up)
    return backbone


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp('bridge') / 'bridge.pth'
    torch.save(bridge_state(learned(build('tocom', dict(r=0)))), path)
    return str(path)


def test_a_vit_b_has_the_published_parameters_and_the_costs_of_the_docs():
    """1.180 M: 24 * 2 * 768 * 16 h at h = 2 (arXiv 2408.06798)."""
    with torch.device('meta'):
        backbone = DyTVisionTransformer('base', **arguments('tocom'))
    parameters = [p.numel() for part in compensators(backbone) for p in part.parameters()]
    assert sum(parameters) == 24 * 2 * 768 * 32 == 1_179_648
    for tuned_at, gmacs in ((8, 13.122), (0, 13.212)):  # merged, unmerged
        set_degree(backbone, 8, tuned_at)
        assert backbone.macs(224, 224, {}) / 1e9 == pytest.approx(gmacs, abs=6e-4)


@pytest.mark.parametrize('skip_unread', [False, True])
@pytest.mark.parametrize(('tuned_at', 'run_at'), WAYS)
@torch.no_grad()
def test_costs_are_those_of_an_operator_counter_and_merged_those_of_merging(tuned_at, run_at, skip_unread):
    backbone = learned(build('tocom', dict(r=0), skip_unread=skip_unread))
    set_degree(backbone, run_at, tuned_at)
    with record_dispatch(backbone) as record:
        counted = count_macs(lambda: backbone(images(1)))
    assert backbone.macs(32, 32, {}) == counted
    assert backbone.macs_of(16, {name: passes[0] for name, passes in record.runs.items()}) == counted
    plain = build('tome', dict(r=run_at), skip_unread=skip_unread).macs(32, 32, {})
    assert (counted > plain) == (tuned_at != run_at)
    assert merge(backbone) == [] and backbone.macs(32, 32, {}) == plain


@pytest.mark.parametrize(('tuned_at', 'run_at'), WAYS)
@pytest.mark.parametrize('method', ['tocom', 'lora+tocom', 'adapter+tocom', 'tocom+dyt'])
def test_merged_equals_unmerged(method, tuned_at, run_at):
    backbone = learned(build(method, {'parts.1.r' if method == 'lora+tocom' else 'r': 2}))
    set_degree(backbone, run_at, tuned_at)
    before = features(backbone)
    assert merge(backbone) == [] and not compensators(backbone)
    torch.testing.assert_close(features(backbone), before, rtol=0, atol=1e-9)


def test_a_model_tuned_without_it_loads_and_runs_with_it_at_any_degree(file):
    tuned = build('tome', dict(r=0))
    bridged = build('tocom', dict(r=0, checkpoint=file))
    bridged.load_state_dict(tuned.state_dict())  # strictly: the bridge is its file's
    torch.testing.assert_close(features(bridged), features(tuned), rtol=0, atol=1e-12)
    set_degree(bridged, 3)
    set_degree(tuned, 3)
    assert not torch.allclose(features(bridged), features(tuned), atol=1e-3)
    built = build('tocom', dict(r=3, tuned_at=0, checkpoint=file))
    built.load_state_dict(tuned.state_dict())
    assert torch.equal(features(built), features(bridged))
    set_degree(bridged, 3, tuned_at=3)
    torch.testing.assert_close(features(bridged), features(tuned), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ('method', 'options', 'message'),
    [
        ('tocom', dict(r=17), 'r must be a number of pairs from 0 to 16 with a bridge, got 17'),
        ('tocom', dict(tuned_at=0), 'checkpoint must name a trained bridge from tuned_at=0 to r=8, got None'),
        ('tocom', dict(scope='mlp'), "parts must hold a ToMe with schedule='constant', scope='block' before a"),
        ('tocom', {'parts.1.run_at': 3}, 'parts must not set run_at of a TokenCompensator, which is filled in, got 3'),
        ('tocom', dict(checkpoint='none.pth'), 'checkpoint must name an existing file, got none.pth'),
    ],
)
def test_mistakes_in_a_config_are_refused(method, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=f'^{message}'):
        build(method, options)


def trainer(method='tocom', **options):
    sizes = dict(arch=dict(embed_dims=32, num_layers=4, num_heads=2, feedforward_channels=64), img_size=32)
    backbone = dict(type='mmdyt.DyTVisionTransformer', patch_size=8, drop_path_rate=0.5, **sizes)
    backbone |= arguments(method, **options)
    head = dict(type='VisionTransformerClsHead', num_classes=5, in_channels=32)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(dict(type='mmdyt.CompensatorTrainer', backbone=backbone, head=head)).double()
    nn.init.normal_(model.head.layers.head.weight)
    return model


def test_training_moves_the_bridge_only_and_leaves_the_degree():
    model = trainer(r=2, dropout=0.0)
    learned(model).train()
    model.loss(images())['loss_bridge'].backward()
    for name, parameter in model.named_parameters():
        assert ('compensator' in name) == parameter.requires_grad == (parameter.grad is not None), name
    assert all(part.training and (part.tuned_at, part.run_at) == (2, 2) for part in compensators(model))
    assert not model.backbone.training and not model.backbone.layers[0].training
    assert 'r=2' in repr(model) or 'pairs=2' in repr(model)


def test_its_loss_is_the_divergence_from_the_same_network_at_the_other_degree(monkeypatch):
    model, x = learned(trainer(dropout=0.0)), images()
    student, teacher = (trainer() for _ in range(2))
    for other in (student, teacher):
        other.load_state_dict(model.state_dict())
        other.eval()
    set_degree(student, 3, tuned_at=1)
    set_degree(teacher, 1, tuned_at=1)
    with torch.no_grad():
        p, q = (other(x, mode='tensor').softmax(1) for other in (teacher, student))
    expected = (p * (p.log() - q.log())).sum() / (3 * 5)
    monkeypatch.setattr(torch, 'randperm', lambda number: torch.tensor([1, 3, 0]))
    torch.testing.assert_close(model.train().loss(x)['loss_bridge'].double(), expected, rtol=1e-5, atol=0)
    assert expected > 1e-3 and model.divergence(x, 2, 2)[0].abs() < 1e-6


def test_degrees_differ_and_all_are_drawn(monkeypatch):
    model, drawn = trainer(), []
    monkeypatch.setattr(model, 'divergence', lambda inputs, a, b: drawn.append((a, b)) or (torch.zeros(()), 5))
    for _ in range(500):
        model.loss(None)
    assert {a for a, _ in drawn} == {b for _, b in drawn} == set(range(17)) and all(a != b for a, b in drawn)


@pytest.mark.parametrize(
    ('method', 'options', 'message'),
    [
        ('tome', {}, 'parts must hold a mmdyt.TokenCompensator for a bridge to be trained, got none'),
        ('adapter+tocom', {}, 'parts must be ToMe and TokenCompensator only for a bridge to be trained, got a Adapter'),
    ],
)
def test_networks_whose_bridge_cannot_be_trained_are_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(method, **options)


def test_a_bridge_of_a_file_is_not_trained(file):
    with pytest.raises(ValueError, match='checkpoint must be None for a bridge to be trained, got'):
        trainer(checkpoint=file)
