"""Processes that share the frozen base train what plain data parallel training trains."""

import pytest
import torch
from conftest import run_distributed

CONFIG = """
_base_ = 'tiny.py'
default_hooks = dict(checkpoint=dict(save_best='mIoU'))
model_wrapper_cfg = dict(type='{wrapper}', find_unused_parameters=True)
"""
WITH_CP = ['--cfg-options', 'model.backbone.with_cp=True']
RECIPES = [
    ['--method', 'evidence', '--method-options', 'hooks.0.num_batches=1', *WITH_CP],  # calibrates in one process alone
    pytest.param(['--cfg-options', 'model.complete_weight=1.0'], marks=pytest.mark.slow),
    pytest.param(['--method', 'sparse_evidence', '--method-options', 'hooks.0.num_batches=1'], marks=pytest.mark.slow),
]
STRATEGY = """
_base_ = 'tiny.py'
runner_type = 'FlexibleRunner'
wrapper = dict(type='MMFullyShardedDataParallel', use_orig_params=True)
strategy = dict(type='FSDPStrategy', model_wrapper=wrapper, state_dict_cfg='full')
"""


@pytest.fixture
def train(tiny_config, tmp_path):
    """``train(name, config, *options)``: the final weights of two processes."""
    (tmp_path / 'tiny.py').write_text(tiny_config.read_text())

    def run(name, config, *options):
        (tmp_path / f'{name}.py').write_text(config)
        run_distributed('train', tmp_path / f'{name}.py', 2, '--work-dir', tmp_path / name, *options)
        return torch.load(tmp_path / name / 'iter_6.pth', weights_only=False)['state_dict']

    return run


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda recipe: recipe[1])
def test_the_same_is_trained_with_a_shared_base(train, recipe):
    plain = train('plain', CONFIG.format(wrapper='MMDistributedDataParallel'), *recipe)
    shared = train('shared', CONFIG.format(wrapper='mmdyt.FrozenShardedDataParallel'), *recipe)
    assert plain.keys() == shared.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(shared[name], tensor, msg=name)


@pytest.mark.slow
def test_the_strategy_of_mmengine_trains_parts_and_saves_whole_weights(train, trained):
    found, plain = train('strategy', STRATEGY), torch.load(trained / 'iter_6.pth')['state_dict']
    assert found.keys() == plain.keys()
    for name, tensor in found.items():
        assert tensor.shape == plain[name].shape
        frozen = name.startswith('backbone.') and '.dynamic.' not in name
        assert not frozen or torch.equal(tensor, plain[name]), name
    assert not torch.equal(found['backbone.layers.0.dynamic.mlp.adapter.up.weight'], torch.zeros(32, 4))
