"""Runs of the tools that end without numbers, or without what a hook was to do: what they say, leave and exit with."""

import json

import pytest
import torch
from conftest import run_distributed

from mmdyt.engine.finite import EXIT_CODE
from mmdyt.preflight.checkpoints import check_resumable

SPOIL = '''
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class SpoilLastRank(Hook):
    """In the second iteration the loss of the last process is no number."""

    priority = 'VERY_HIGH'

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if get_rank() == 1 and runner.iter == 1:
            outputs['loss'] = outputs['loss'] * float('nan')
'''
HOOK = "_base_ = '{base}'\ncustom_hooks = [*_base_.custom_hooks, dict(type='mmdyt.CalibrationHook')]\n"
EVIDENCE = """
_base_ = '{base}'
model = dict(rate_weight=0.0, backbone=dict(dispatcher=dict(noise=False, fitted=True)))
custom_hooks = [*_base_.custom_hooks, dict(type='mmdyt.EvidenceHook', begin=0.5)]
"""


def code_of(run_tool, *args) -> int:
    with pytest.raises(SystemExit) as stop:
        run_tool(*args)
    return stop.value.code


def test_training_that_diverges_ends_with_one_line_and_leaves_no_checkpoint(run_tool, tiny_config, tmp_path, capfd):
    options = 'optim_wrapper.optimizer.lr=1e30', 'default_hooks.checkpoint.interval=2'
    assert code_of(run_tool, 'train', tiny_config, '--work-dir', tmp_path, '--cfg-options', *options) == EXIT_CODE
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith('error: loss must be finite, got loss=nan, ')
    assert ' in iteration 2. There is no checkpoint yet. Lower optim_wrapper.optimizer.lr' in error
    assert not list(tmp_path.glob('*.pth'))


@pytest.mark.slow
def test_weights_that_overflow_give_no_metrics_without_a_word(run_tool, tiny_config, trained, tmp_path, capfd):
    """They are finite themselves: nothing is wrong before the test."""
    content = torch.load(trained / 'iter_6.pth')
    content['state_dict']['backbone.cls_token'].fill_(3e38)
    torch.save(content, tmp_path / 'huge.pth')
    work_dir = tmp_path / 'test'
    assert code_of(run_tool, 'test', tiny_config, tmp_path / 'huge.pth', '--work-dir', work_dir) == EXIT_CODE
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith('error: predictions must be numbers, got NaN for 4 samples, ')
    assert error.endswith('and 1 more. Training diverged, or these are broken.')
    (file,) = work_dir.glob('*/*.json')
    assert 'activation_rate' not in json.loads(file.read_text())  # the metrics are saved all the same


@pytest.mark.slow
def test_all_processes_stop_in_the_iteration_in_which_one_has_no_loss(tiny_config, tmp_path):
    (tmp_path / 'spoil.py').write_text(SPOIL)
    (tmp_path / 'two.py').write_text(
        f"_base_ = '{tiny_config}'\n"
        "custom_imports = dict(imports=['mmdyt.models.segmentor', 'mmdyt.engine', 'spoil'])\n"
        "custom_hooks = [dict(type='SpoilLastRank')]\n"
        'default_hooks = dict(checkpoint=dict(interval=1))\n'
    )
    with pytest.raises(
        AssertionError, match=r'error: loss must be finite, got another in another process in iteration 2'
    ):
        run_distributed('train', tmp_path / 'two.py', 2, '--work-dir', tmp_path / 'run')
    assert [path.name for path in (tmp_path / 'run').glob('*.pth')] == ['iter_1.pth']


def test_a_calibration_that_fails_ends_the_run_with_an_error_after_all_is_saved(
    run_tool, tiny_config, tmp_path, monkeypatch, capfd
):
    def fail(*args):
        raise MemoryError('too large')

    monkeypatch.setattr('mmdyt.engine.calibration.calibrate_host', fail)
    (tmp_path / 'hook.py').write_text(HOOK.format(base=tiny_config))
    args = '--work-dir', tmp_path / 'run', '--cfg-options', 'train_cfg.max_iters=1'
    assert code_of(run_tool, 'train', tmp_path / 'hook.py', *args) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith('error: calibration must succeed, got MemoryError: too large. The checkpoint is whole')
    assert (tmp_path / 'run' / 'iter_1.pth').exists()
    (log,) = (tmp_path / 'run').glob('*/vis_data/scalars.json')
    assert 'mIoU' in log.read_text()


@pytest.mark.slow
def test_a_fit_that_fails_keeps_what_was_trained(run_tool, tiny_config, tmp_path, monkeypatch):
    def fail(*args):
        raise ValueError('losses must give finite evidence')

    monkeypatch.setattr('mmdyt.engine.evidence.fit_host', fail)
    (tmp_path / 'hook.py').write_text(EVIDENCE.format(base=tiny_config))
    args = '--work-dir', tmp_path / 'run', '--cfg-options', 'train_cfg.max_iters=4'
    with pytest.raises(ValueError, match='^losses must give finite evidence$'):
        run_tool('train', tmp_path / 'hook.py', *args)
    assert [path.name for path in (tmp_path / 'run').glob('*.pth')] == ['before_fit.pth']
    check_resumable(str(tmp_path / 'run' / 'before_fit.pth'))
    assert torch.load(tmp_path / 'run' / 'before_fit.pth')['meta']['iter'] == 2
