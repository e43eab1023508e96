"""Sparse-Tuning in three stages: all tokens, fewer and fewer, as few as are wanted; resumed, and in two processes."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import run_distributed
from mmengine.hooks import EMAHook
from test_evidence_hook import RANK_HOOK, check_resumed, rows, state

from mmdyt.engine import KeepRateHook
from mmdyt.parts.evidence_tokens import EvidenceTokens

CONFIG = """
_base_ = '{base}'
model = dict(
    backbone=dict(
        adapter=None, dispatcher=None, tuned=None,
        parts=[dict(type='mmdyt.{kind}', keep_rate=0.5, at=[1, 2]), dict(type='mmdyt.DenseAdapter', bottleneck=4)]))
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='mmdyt.KeepRateHook', begin=0.5, end=0.8, num_batches=2, feature_weight=0.5),
]
"""
LENGTHS_HOOK = '''
import json
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class WriteRates(Hook):
    """Writes the keep rates of each step."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        rates = {m.keep_rate for m in runner.model.modules() if hasattr(m, 'keep_rate')}
        with Path(runner.work_dir, 'rates.txt').open('a') as file:
            file.write(json.dumps(sorted(rates)) + chr(10))
'''


def write(folder, base, kind='EvidenceTokens', hook=LENGTHS_HOOK, name='WriteRates'):
    (folder / 'own_hook.py').write_text(hook)
    text = CONFIG.format(base=base, kind=kind).replace('    dict(type=', f"    dict(type='{name}'), dict(type=", 1)
    imports = "custom_imports = dict(imports=['mmdyt.models.segmentor', 'mmdyt.engine', 'own_hook'])\n"
    (folder / 'sparse.py').write_text(text + imports)
    return folder / 'sparse.py'


def gates(path) -> list[torch.Tensor]:
    return [tensor for name, tensor in state(path).items() if name.endswith('tokens.gate.weight')]


@pytest.fixture(scope='module')
def sparse(tmp_path_factory, run_tool, tiny_config):
    """Work dir of 6 iterations, the first 3 with all tokens, and its config."""
    folder = tmp_path_factory.mktemp('sparse')
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        config = write(folder, tiny_config)
        run_tool('train', config, '--work-dir', folder / 'work_dir')
    return folder / 'work_dir', config


def test_rates_fall_in_a_line_and_gates_are_fitted_once(sparse):
    work_dir, _ = sparse
    rates = [json.loads(line)[0] for line in (work_dir / 'rates.txt').read_text().splitlines()]
    assert rates == pytest.approx([1, 1, 1, 1 - 0.5 * (4 / 6 - 0.5) / 0.3, 0.5, 0.5])
    before, after = gates(work_dir / 'iter_3.pth'), gates(work_dir / 'iter_6.pth')
    assert len(after) == 2 and all(not torch.equal(b, a) for b, a in zip(before, after, strict=True))
    (log,) = work_dir.glob('*/*.log')
    (found,) = re.findall(
        r'Fitted token gates; explained variance of the log evidence by layer (.*)\.\n', log.read_text()
    )
    assert len(found.split()) == 2
    losses = [row['loss_features'] for row in rows(work_dir) if 'loss_features' in row]
    assert len(losses) == 3 and losses[0] < losses[1]  # tokens are missing from the fifth step on


@pytest.mark.parametrize('first', [3, 4])
def test_a_resumed_run_ends_alike(sparse, run_tool, tmp_path, monkeypatch, first):
    """From before the fit, and from after it."""
    monkeypatch.syspath_prepend(sparse[1].parent)
    check_resumed(run_tool, *sparse, tmp_path, first)


def test_weights_of_another_run_are_no_run_that_goes_on(sparse, run_tool, tmp_path, monkeypatch):
    """Its gates are fitted anew, and its teacher does not teach."""
    work_dir, config = sparse
    monkeypatch.syspath_prepend(config.parent)
    run_tool('train', config, '--work-dir', tmp_path, '--cfg-options', f'load_from={work_dir / "iter_6.pth"}')
    assert all(
        not torch.equal(b, a)
        for b, a in zip(gates(work_dir / 'iter_6.pth'), gates(tmp_path / 'iter_6.pth'), strict=True)
    )
    assert len([row for row in rows(tmp_path) if 'loss_features' in row]) == 3


def test_a_run_that_an_error_ended_leaves_the_wanted_rate():
    model = torch.nn.ModuleList([EvidenceTokens(8, keep_rate=0.5)])
    wrapper = SimpleNamespace(_accumulative_counts=1)
    runner = SimpleNamespace(model=model, hooks=[], max_iters=6, iter=0, optim_wrapper=wrapper)
    KeepRateHook().before_train(runner)
    first = KeepRateHook()
    first.before_train(runner)
    first.before_train_iter(runner, 0)
    assert model[0].keep_rate == 1  # and there the error
    again = KeepRateHook()
    again.before_train(runner)
    again.after_train(runner)
    assert model[0].keep_rate == 0.5


def test_tokens_kept_by_attention_have_stages_too(tiny_config, run_tool, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    config = write(tmp_path, tiny_config, 'SparseTokens')
    run_tool('train', config, '--work-dir', tmp_path / 'run', '--amp')
    assert [row['loss_features'] > 0 for row in rows(tmp_path / 'run') if 'loss_features' in row] == [True] * 3


def test_processes_end_alike(tiny_config, tmp_path):
    config = write(tmp_path, tiny_config, hook=RANK_HOOK, name='WriteState')
    run_distributed('train', config, 2, '--work-dir', tmp_path)
    first, second = (torch.load(tmp_path / f'rank{rank}.pth') for rank in (0, 1))
    parts = [name for name in first if '.dynamic.' in name]
    assert sum('gate' in name for name in parts) == 4
    assert all(torch.equal(first[name], second[name]) for name in parts)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(begin=1.5), r'begin must lie in \[0, 1\), got 1.5'),
        (dict(end=0.2), r'end must lie in \[begin, 1\] = \[0.4, 1\], got 0.2'),
        (dict(num_batches=0), 'num_batches must be at least 1, got 0'),
        (dict(feature_weight=-1), 'feature_weight must be at least 0, got -1'),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KeepRateHook(**options)


def test_a_model_that_keeps_all_is_refused():
    runner = SimpleNamespace(model=torch.nn.Linear(1, 1), hooks=[], max_iters=6)
    with pytest.raises(ValueError, match='model must have parts with a keep_rate with mmdyt.KeepRateHook, got none'):
        KeepRateHook().before_train(runner)


def test_averaged_weights_are_refused_beside_gates():
    model = torch.nn.ModuleList([EvidenceTokens(8)])
    runner = SimpleNamespace(model=model, hooks=[EMAHook()], max_iters=6)
    with pytest.raises(ValueError, match='custom_hooks must hold mmdyt.KeepRateHook or EMAHook, got both'):
        KeepRateHook().before_train(runner)
