"""Training in three stages: all tokens, fewer and fewer of them, the target rate; and it ends where inference is."""

import copy
import json
import logging
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from conftest import run_distributed
from mmengine.dataset import pseudo_collate
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, DefaultScope
from test_calibration import CLASSIFIER
from torch.utils.data import DataLoader

import mmdyt.models.classifier  # noqa: F401  repairs the wheels, registers
from mmdyt.engine import EvidenceHook, TauScheduleHook
from mmdyt.engine.evidence import fit_host, scheduled_rate

# isort: split
from mmpretrain.structures import DataSample

LAYERS = 4
CONFIG = """
_base_ = '{base}'
model = dict(
    rate_weight=0.0,
    backbone=dict(
        dispatcher=dict(noise=False), substitute=dict(type='mmdyt.MeanUpdate'), tuned=('adapter', 'substitute')))
custom_hooks = [
    *_base_.custom_hooks,
    dict(
        type='mmdyt.EvidenceHook', begin=0.5, end=0.8, num_batches=2, feature_weight=0.5, inactive_weight=4.0),
    dict(type='mmdyt.CalibrationHook', rule='global'),
]
"""
RANK_HOOK = '''
from pathlib import Path

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class WriteState(Hook):
    """Writes what this rank ends with."""

    def after_train(self, runner):
        torch.save(runner.model.module.state_dict(), Path(runner.work_dir) / f'rank{get_rank()}.pth')
'''


def state(path) -> dict[str, torch.Tensor]:
    return torch.load(path)['state_dict']


def of_dispatchers(path, part: str) -> list[torch.Tensor]:
    return [tensor for name, tensor in state(path).items() if name.endswith(f'dispatcher.{part}')]


def rows(work_dir) -> list[dict]:
    (log,) = work_dir.glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in log.read_text().splitlines()]


def check_resumed(run_tool, work_dir, config, folder, first: int) -> None:
    """A run that is resumed from iteration 3 or 4 ends as the one of 6 iterations that was not."""
    checkpoint = work_dir / f'iter_{first}.pth'
    if first == 4:
        more = '--cfg-options', 'default_hooks.checkpoint.interval=4', 'train_cfg.val_interval=7'
        run_tool('train', config, '--work-dir', folder, *more)
        checkpoint = folder / 'iter_4.pth'
    run_tool('train', config, '--work-dir', folder / 'resumed', '--resume', checkpoint)
    expected, found = state(work_dir / 'iter_6.pth'), state(folder / 'resumed' / 'iter_6.pth')
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.fixture(scope='module')
def staged(tmp_path_factory, run_tool, tiny_config):
    """Work dir of 6 iterations, the first 3 with all tokens, and its config."""
    folder = tmp_path_factory.mktemp('staged')
    config = folder / 'staged.py'
    config.write_text(CONFIG.format(base=tiny_config))
    run_tool('train', config, '--work-dir', folder / 'work_dir')
    return folder / 'work_dir', config


def test_stages_follow_each_other(staged):
    work_dir, _ = staged
    rates = [row['activation_rate'] for row in rows(work_dir) if 'loss_rate' in row]
    assert rates[:4] == [1.0] * 4  # the fitted gates have seen no batch before the fourth step
    assert rates[4] == pytest.approx(scheduled_rate(4 / 6, 0.5, 0.8, 0.5), abs=0.1)
    assert 0.3 < rates[5] < 0.7  # the threshold is that of another batch of two small images
    scheduled = [row['scheduled_rate'] for row in rows(work_dir) if 'scheduled_rate' in row]
    assert scheduled == pytest.approx([scheduled_rate(step / 6, 0.5, 0.8, 0.5) for step in (4, 5)])
    validations = [row['activation_rate'] for row in rows(work_dir) if 'mIoU' in row]
    assert validations[0] == 1.0 and validations[1] == pytest.approx(0.5, abs=0.05)


def test_gates_are_fitted_once_and_not_trained(staged):
    work_dir, _ = staged
    before, after = (of_dispatchers(work_dir / f'iter_{i}.pth', 'gate.weight') for i in (3, 6))
    assert all(not torch.equal(b, a) for b, a in zip(before, after, strict=True))
    assert all(b.std() < 0.05 for b in before)  # as they were drawn
    (log,) = work_dir.glob('*/*.log')
    assert log.read_text().count('Fitted dispatchers; explained variance of the log evidence by layer 0.') == 1
    assert of_dispatchers(work_dir / 'iter_3.pth', 'threshold') == [-math.inf] * LAYERS
    last = of_dispatchers(work_dir / 'iter_6.pth', 'threshold')
    assert len(set(map(float, last))) == 1 and last[0].isfinite()


def test_substitutes_are_fitted_with_the_gates_and_trained_from_there(staged, run_tool, tmp_path):
    work_dir, config = staged

    def substitutes(path) -> list[torch.Tensor]:
        return [tensor for name, tensor in state(path).items() if name.endswith('substitute.value')]

    keep = 'default_hooks.checkpoint.interval=1', 'default_hooks.checkpoint.max_keep_ckpts=9'
    steps = '--cfg-options', *keep, 'train_cfg.val_interval=7'
    run_tool('train', config, '--work-dir', tmp_path, '--resume', work_dir / 'iter_3.pth', *steps)
    assert not any(value.any() for value in substitutes(work_dir / 'iter_3.pth'))
    fitted, last = substitutes(tmp_path / 'iter_4.pth'), substitutes(work_dir / 'iter_6.pth')
    assert len(fitted) == LAYERS and all(value.norm() > 0.01 for value in fitted)
    assert all(0 < (after - before).norm() < before.norm() for before, after in zip(fitted, last, strict=True))


def test_features_are_held_to_those_of_the_first_stage(staged, run_tool, tmp_path):
    work_dir, config = staged
    losses = [row['loss_features'] for row in rows(work_dir) if 'loss_features' in row]
    assert len(losses) == 3 and all(loss > 0 for loss in losses)  # of the steps 4 to 6
    teacher, then = torch.load(work_dir / 'iter_6.pth')['teacher'], state(work_dir / 'iter_3.pth')
    adapters = [name for name in teacher if '.adapter.' in name]
    assert adapters and all(torch.equal(teacher[name], then[f'backbone.{name}']) for name in adapters)
    assert 'teacher' not in torch.load(work_dir / 'iter_3.pth')


def test_a_run_that_began_without_a_teacher_cannot_go_on_with_one(staged, run_tool, tmp_path):
    work_dir, config = staged
    content = torch.load(work_dir / 'iter_6.pth')
    del content['teacher']
    torch.save(content, tmp_path / 'plain.pth')
    args = '--work-dir', tmp_path / 'run', '--resume', tmp_path / 'plain.pth', '--cfg-options'
    with pytest.raises(ValueError, match='feature_weight must be 0 for a checkpoint without a teacher, got 0.5'):
        run_tool('train', config, *args, 'train_cfg.max_iters=9')


def test_cells_that_skipped_count_more_once_some_skip(staged, run_tool, tmp_path):
    """In the first step of the teacher every token runs."""
    work_dir, config = staged
    resume = '--work-dir', tmp_path, '--resume', work_dir / 'iter_3.pth', '--cfg-options'
    run_tool('train', config, *resume, 'custom_hooks.3.inactive_weight=0.0', 'train_cfg.val_interval=7')
    plain = [row['loss_features'] for row in rows(tmp_path) if 'loss_features' in row]
    found = [row['loss_features'] for row in rows(work_dir) if 'loss_features' in row]
    assert found[0] == pytest.approx(plain[0])
    assert found[1] != pytest.approx(plain[1], rel=1e-3)


@pytest.mark.parametrize('first', [3, 4])
def test_a_resumed_run_ends_alike(staged, run_tool, tmp_path, first):
    """From before and from within the second stage."""
    check_resumed(run_tool, *staged, tmp_path, first)


def test_a_run_that_is_resumed_past_the_fit_is_fitted_at_once(staged, run_tool, tmp_path):
    work_dir, config = staged
    args = '--work-dir', tmp_path, '--resume', work_dir / 'iter_3.pth', '--cfg-options', 'custom_hooks.3.begin=0.1'
    run_tool('train', config, *args)
    (log,) = tmp_path.glob('*/*.log')
    assert log.read_text().count('Fitted dispatchers') == 1
    last = of_dispatchers(tmp_path / 'iter_6.pth', 'threshold')
    assert last[0].isfinite()


def test_processes_end_alike(tiny_config, tmp_path):
    (tmp_path / 'rank_hook.py').write_text(RANK_HOOK)
    config = CONFIG.format(base=tiny_config).replace('custom_hooks = [', "custom_hooks = [dict(type='WriteState'), ")
    imports = "custom_imports = dict(imports=['mmdyt.models.segmentor', 'mmdyt.engine', 'rank_hook'])\n"
    (tmp_path / 'two.py').write_text(config + imports)
    run_distributed('train', tmp_path / 'two.py', 2, '--work-dir', tmp_path)
    first, second = (torch.load(tmp_path / f'rank{rank}.pth') for rank in (0, 1))
    parts = [name for name in first if '.dynamic.' in name]
    assert len(parts) == LAYERS * 8 and all(torch.equal(first[name], second[name]) for name in parts)
    assert first['backbone.layers.0.dynamic.mlp.dispatcher.threshold'].isfinite()


def test_the_schedule_falls_in_a_line():
    found = [scheduled_rate(progress, 0.25, 0.75, 0.4) for progress in (0, 0.25, 0.5, 0.75, 1)]
    assert found == pytest.approx([1, 1, 0.7, 0.4, 0.4])
    assert scheduled_rate(0.5, 0.5, 0.5, 0.3) == 0.3 and scheduled_rate(0.49, 0.5, 0.5, 0.3) == 1


def zero_head(accumulate: int = 1, max_iters: int = 6) -> SimpleNamespace:
    """A runner of a classifier whose head is as mmpretrain starts it: zero."""
    parts = dict(dispatcher=dict(noise=False, fitted=True), substitute=dict(type='mmdyt.MeanUpdate'))
    weights = dict(rate_weight=0.0, complete_weight=0.0, distill_weight=0.0)
    cfg = CLASSIFIER | weights | dict(backbone=CLASSIFIER['backbone'] | parts)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(copy.deepcopy(cfg)).train()
    for parameter in model.head.parameters():
        nn.init.zeros_(parameter)
    samples = [dict(inputs=torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)) for _ in range(8)]
    samples = [sample | dict(data_samples=DataSample().set_gt_label(i % 2)) for i, sample in enumerate(samples)]
    loader = DataLoader(samples, 4, collate_fn=pseudo_collate)
    tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return SimpleNamespace(
        model=model,
        hooks=[],
        iter=0,
        max_iters=max_iters,
        train_dataloader=loader,
        optim_wrapper=OptimWrapper(torch.optim.SGD(tuned, lr=0.1), accumulative_counts=accumulate),
        message_hub=SimpleNamespace(update_scalar=lambda *args: None),
        logger=logging.getLogger('evidence'),
    )


def rates_of_training(hook: EvidenceHook, runner: SimpleNamespace) -> list[float]:
    """Activation rates of the steps of a training."""
    rates = []
    hook.before_train(runner)
    batch = next(iter(runner.train_dataloader))
    for step in range(runner.max_iters):
        runner.iter = step
        hook.before_train_iter(runner, 0)
        rates.append(runner.model.train_step(copy.deepcopy(batch), runner.optim_wrapper)['activation_rate'].item())
        hook.after_train_iter(runner, 0)
    return rates


@pytest.mark.parametrize('begin', [0, 0.01, 0.3])
@pytest.mark.parametrize('accumulate', [1, 3])
def test_a_head_that_starts_at_zero_has_made_a_step_before_gates_are_fitted(begin, accumulate):
    runner = zero_head(accumulate)
    rates = rates_of_training(EvidenceHook(begin=begin, end=0.5, num_batches=1), runner)
    first = max(round(begin * 6), accumulate)
    assert rates[: first + 1] == [1.0] * (first + 1)
    assert rates[-1] == pytest.approx(0.5, abs=0.2) and all(rate < 1 for rate in rates[first + 2 :])


def test_a_training_without_a_step_is_refused():
    for hook in (EvidenceHook(), TauScheduleHook()):
        with pytest.raises(ValueError, match=f'^max_iters must be at least 1 with mmdyt.{type(hook).__name__}, got 0'):
            hook.before_train(zero_head(max_iters=0))


def test_a_fit_that_is_refused_leaves_the_model_as_it_was():
    runner = zero_head()
    before = copy.deepcopy(runner.model.state_dict())
    with pytest.raises(ValueError, match='losses must give finite evidence'):
        fit_host(runner.model, runner.train_dataloader, 1)
    torch.testing.assert_close(runner.model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(begin=-0.1), r'begin must lie in \[0, 1\), got -0.1'),
        (dict(begin=1.0), r'begin must lie in \[0, 1\), got 1.0'),
        (dict(begin=0.5, end=0.4), r'end must lie in \[begin, 1\] = \[0.5, 1\], got 0.4'),
        (dict(end=1.1), r'end must lie in .*, got 1.1'),
        (dict(feature_weight=-1.0), 'feature_weight must be at least 0, got -1.0'),
        (dict(num_batches=0), 'num_batches must be at least 1, got 0'),
        (dict(feature_weight=1.0, inactive_weight=-1.0), 'inactive_weight must be at least 0, got -1.0'),
        (dict(inactive_weight=1.0), 'inactive_weight must be 0 without a feature_weight, got 1.0'),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f'^{message}'):
        EvidenceHook(**arguments)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['model.rate_weight=2.0'], 'rate_weight must be 0 with mmdyt.EvidenceHook, got 2.0'),
        (
            ['model.backbone.dispatcher.noise=True'],
            'dispatcher must not sample with .*, got noise=True',
        ),
        (
            ['model.backbone.out_type=raw'],
            r"inactive_weight must be 0 unless the backbone gives maps \(out_type='featmap'\), got 4.0 with .*'raw'",
        ),
        (
            ['custom_hooks.0.type=EMAHook'],
            'custom_hooks must hold mmdyt.EvidenceHook or EMAHook, got both',
        ),
        (
            [f'model.backbone.{part}' for part in ('dispatcher=None', 'substitute=None', "tuned=['adapter']")],
            'model must have a dispatcher with a threshold',
        ),
    ],
)
def test_models_that_do_not_suit_are_refused_before_training(staged, run_tool, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit, match='2'):
        run_tool('train', staged[1], '--work-dir', tmp_path / 'run', '--cfg-options', *options)
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / 'run').exists()
