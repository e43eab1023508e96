"""tools/train_compensator.py: the bridge is trained and nothing else, resumed, written, and loads into a model."""

import json
import pickle

import pytest
import torch
from conftest import ROOT

CONFIG = """
_base_ = ['{tiny}', '{root}/configs/_base_/methods/tocom.py']
pretrained = dict(type='Pretrained', checkpoint='{weights}', prefix='head.')
model = dict(
    type='mmdyt.CompensatorTrainer', backbone=_base_.method, head=dict(num_classes=5, init_cfg=pretrained))
optim_wrapper = dict(optimizer=dict(lr=0.1))
param_scheduler = []
train_cfg = dict(_delete_=True, by_epoch=False, max_iters=2)
default_hooks = dict(checkpoint=dict(interval=1, by_epoch=False))
"""
METHOD = ['--method', 'adapter+tocom', '--method-options']


@pytest.fixture(scope='module')
def weights(tmp_path_factory, pretrained):
    """A network whose class scores say something."""
    content = torch.load(pretrained)
    for tensor in (content['state_dict'][f'head.layers.head.{name}'] for name in ('weight', 'bias')):
        tensor.normal_(generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp('weights') / 'with_head.pth'
    torch.save(content, path)
    return path


@pytest.fixture(scope='module')
def config(tmp_path_factory, tiny_cls_config, weights):
    path = tmp_path_factory.mktemp('tocom') / 'bridge.py'
    path.write_text(CONFIG.format(tiny=tiny_cls_config, root=ROOT, weights=weights))
    return path


@pytest.fixture(scope='module')
def trained(tmp_path_factory, config, run_tool):
    folder = tmp_path_factory.mktemp('bridge')
    run_tool('train_compensator', config, '--out', folder / 'bridge.pth', '--work-dir', folder)
    return folder


def state(path):
    return torch.load(path)['state_dict']


def test_two_steps_train_the_bridge_and_leave_the_rest(trained, weights):
    end, base = state(trained / 'iter_2.pth'), state(weights)
    assert all(torch.equal(end[name], base[name]) for name in base if 'pos_embed' not in name)  # and its head
    bridge = torch.load(trained / 'bridge.pth')
    assert bridge['bridge'] == dict(rank=2, scale=0.1, widths=[(32, 32)])
    names = [f'layers.{i}.attn.{row}.{which}' for i in range(4) for row in 'qv' for which in ('down', 'up')]
    assert list(bridge['state_dict']) == names
    for name, tensor in bridge['state_dict'].items():
        layer, _, short = name.partition('.attn.')
        assert torch.equal(tensor, end[f'backbone.{layer}.dynamic.attn.compensator.{short}'])
    assert max(tensor.abs().max() for name, tensor in bridge['state_dict'].items() if '.up' in name) > 0.01


def test_a_resumed_run_writes_the_same_bridge(tmp_path, trained, config, run_tool):
    out = tmp_path / 'bridge.pth'
    run_tool('train_compensator', config, '--out', out, '--work-dir', tmp_path, '--resume', trained / 'iter_1.pth')
    whole, resumed, first = state(trained / 'bridge.pth'), state(out), state(trained / 'iter_1.pth')
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not torch.equal(whole['layers.0.attn.v.up'], first['backbone.layers.0.dynamic.attn.compensator.v.up'])


@pytest.mark.slow
def test_mixed_precision_trains_it_too(tmp_path, config, run_tool):
    run_tool('train_compensator', config, '--out', tmp_path / 'bridge.pth', '--work-dir', tmp_path, '--amp')
    tensors = state(tmp_path / 'bridge.pth')
    assert all(tensor.isfinite().all() and tensor.dtype == torch.float32 for tensor in tensors.values())


@pytest.mark.slow
def test_a_tuned_model_is_tested_at_another_degree_with_the_bridge(tmp_path, trained, tiny_cls_config, run_tool):
    """Tuned without merging; tested with it, without and with the bridge, which no checkpoint of a task holds."""
    short = ['--cfg-options', 'train_cfg.max_epochs=1']
    run_tool('train', tiny_cls_config, '--work-dir', tmp_path, '--method', 'adapter', *short)
    checkpoint = tmp_path / 'epoch_1.pth'
    assert not any('compensator' in name for name in state(checkpoint))

    def tested(name, *options):
        dump = tmp_path / f'{name}.pkl'
        run_tool('test', tiny_cls_config, checkpoint, '--work-dir', tmp_path / name, *options, '--dump', dump)
        (file,) = (tmp_path / name).glob('*/*.json')
        scores = torch.stack([torch.as_tensor(one['pred_score']) for one in pickle.loads(dump.read_bytes())])
        return scores, json.loads(file.read_text())['gmacs']

    bridge = trained / 'bridge.pth'
    merged, cost = tested('merged', '--method', 'adapter+tome', '--method-options', 'r=8')
    bridged, more = tested('bridged', *METHOD, 'r=8', 'tuned_at=0', f'checkpoint={bridge}', 'scale=3.0')
    same, equal = tested('same', *METHOD, 'r=8', f'checkpoint={bridge}', 'scale=3.0')
    assert (bridged - merged).abs().max() > 1e-4 and more > cost
    torch.testing.assert_close(same, merged)
    assert equal == cost


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--out', 'none/bridge.pth'], '--out must'),
        (['--cfg-options', 'model.type=mmdyt.DyTImageClassifier'], 'model.type must be mmdyt.CompensatorTrainer, got'),
        (['--cfg-options', 'model.head.init_cfg=None'], "model.head.init_cfg must be of type 'Pretrained', got None"),
        (['--cfg-options', 'model.head.num_classes=3'], 'checkpoint must fit the model'),
        (['--cfg-options', 'model.head.init_cfg.checkpoint=none.pth'], 'must name an existing file, got none.pth'),
        (['--cfg-options', 'model.backbone.parts.0.r=17'], 'r must be a number of pairs from 0 to 16'),
        (
            ['--cfg-options', 'model.backbone.parts.0.schedule=falling'],
            "parts must hold a ToMe with schedule='constant'",
        ),
        (['--cfg-options', 'model.backbone.parts.1.rank=0'], 'rank must be a positive integer, got 0'),
        (['--resume', 'none.pth'], 'checkpoint must name an existing file, got none.pth'),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(tmp_path, config, run_tool, capfd, options, message):
    with pytest.raises(SystemExit) as error:
        run_tool('train_compensator', config, '--out', tmp_path / 'b.pth', '--work-dir', tmp_path / 'out', *options)
    assert error.value.code == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / 'out').exists() and not (tmp_path / 'b.pth').exists()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['r=1', 'tuned_at=0'], 'checkpoint must name a trained bridge from tuned_at=0 to r=1, got None'),
        (['r=1', 'tuned_at=0', 'checkpoint=none.pth'], 'checkpoint must name an existing file, got none.pth'),
        (
            ['r=1', 'tuned_at=0', 'checkpoint={weights}'],
            'checkpoint must be a file that tools/train_compensator.py wrote',
        ),
        (
            ['r=1', 'tuned_at=0', 'rank=3', 'checkpoint={bridge}'],
            'checkpoint must hold a bridge of this network and rank',
        ),
        (['r=1', 'tuned_at=17', 'checkpoint={bridge}'], 'tuned_at must be a number of pairs from 0 to 16'),
    ],
)
def test_bridges_that_do_not_fit_are_refused(
    tmp_path, trained, tiny_cls_config, pretrained, run_tool, capfd, options, message
):
    files = dict(weights=pretrained, bridge=trained / 'bridge.pth')
    options = [option.format(**files) for option in options]
    with pytest.raises(SystemExit):
        run_tool('train', tiny_cls_config, '--work-dir', tmp_path / 'out', *METHOD, *options)
    assert message in capfd.readouterr().err and not (tmp_path / 'out').exists()
