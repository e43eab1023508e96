"""tools/calibrate.py: a checkpoint becomes one with thresholds, and nothing else changes."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import load_tool

from mmdyt.parts.mean_update import MeanUpdate

LAYERS, PATCHES, WIDTH, HIDDEN = 4, 24, 32, 64  # the tiny ViT on validation images of 64 x 96
BRANCHES = [f'backbone.layers.{i}.dynamic.mlp' for i in range(LAYERS)]
THRESHOLDS = [f'{branch}.dispatcher.threshold' for branch in BRANCHES]


def state(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path)['state_dict']


def thresholds(path: Path) -> list[float]:
    return [state(path)[name].item() for name in THRESHOLDS]


def metrics(run_tool, config, checkpoint, work_dir: Path) -> dict:
    """What tools/test.py reports."""
    run_tool('test', config, checkpoint, '--work-dir', work_dir)
    (file,) = work_dir.glob('*/*.json')
    return {name: value for name, value in json.loads(file.read_text()).items() if not name.endswith('time')}


@pytest.fixture
def calibrate(run_tool, tiny_config, trained, tmp_path, capfd):
    """``calibrate(...)`` calibrates the trained checkpoint; returns the new file and what was printed."""

    def run(*args, out: str = 'out.pth', checkpoint: Path = trained / 'iter_6.pth', config=tiny_config):
        capfd.readouterr()
        run_tool('calibrate', config, checkpoint, tmp_path / out, *args)
        return tmp_path / out, capfd.readouterr().out

    return run


@pytest.fixture
def refused(calibrate, tmp_path, capfd):
    """``refused(...)`` returns the message with which the tool refuses; nothing is written."""

    def refuse(*args, **files) -> str:
        capfd.readouterr()
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
        with pytest.raises(SystemExit) as exit_info:
            calibrate(*args, **files)
        assert exit_info.value.code == 2
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == before
        (message,) = capfd.readouterr().err.splitlines()
        assert re.match(r'error: .*\S+ must .+, got .+', message)
        return message

    return refuse


class OwnMean(MeanUpdate):
    """What inactive tokens get, under another word."""

    word = 'own_mean'


def test_what_a_fit_sets_is_found_by_what_parts_are_whatever_their_words():
    from mmdyt.models import DyTVisionTransformer

    arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
    parts = [dict(type=OwnMean, site='mlp'), dict(type='mmdyt.LoRA')]
    model = DyTVisionTransformer(arch=arch, img_size=32, patch_size=16, parts=parts)
    kept = ('dispatcher.threshold', 'dispatcher.gate.weight', 'dispatcher.gate.bias', 'own_mean.value')
    found = load_tool('calibrate').dispatcher_tensors(model)
    assert set(found) == {f'layers.{i}.dynamic.mlp.{name}' for i in range(2) for name in kept}


def test_only_the_thresholds_change(calibrate, trained):
    before = (trained / 'iter_6.pth').read_bytes()
    out, _ = calibrate()
    assert (trained / 'iter_6.pth').read_bytes() == before
    assert thresholds(trained / 'iter_6.pth') == [0.0] * LAYERS and 0.0 not in thresholds(out)
    assert torch.load(out).keys() == torch.load(trained / 'iter_6.pth').keys()
    old, new = state(trained / 'iter_6.pth'), state(out)
    assert list(old) == list(new)
    assert {name for name in old if not torch.equal(old[name], new[name])} == set(THRESHOLDS)


@pytest.mark.parametrize(('rule', 'rate'), [('rate_matched', 0.25), ('uniform', 0.75), ('global', 0.5)])
def test_prints_thresholds_and_rates(calibrate, rule, rate):
    out, printed = calibrate('--rule', rule, '--target-rate', str(rate), '--batches', '2')
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('branch '))
    table = [line.split() for line in lines[start : start + 1 + LAYERS]]
    assert table[0] == ['branch', 'threshold', 'rate']
    assert [row[0] for row in table[1:]] == BRANCHES
    assert [float(row[1]) for row in table[1:]] == pytest.approx(thresholds(out), abs=1e-4)
    rates = [float(row[2]) for row in table[1:]]
    achieved, wanted = re.search(r'^Activation rate (\S+) \(target (\S+)\), by layer', printed, re.M).groups()
    assert float(wanted) == rate
    assert float(achieved) == pytest.approx(sum(rates) / LAYERS, abs=1e-3) == pytest.approx(rate, abs=0.02)
    assert lines[-1] == f'Wrote {out}.'
    if rule == 'uniform':
        assert rates == pytest.approx([rate] * LAYERS, abs=0.51 / (4 * PATCHES))  # 4 images


def test_the_wanted_rate_is_the_models_and_all_is_repeatable(calibrate):
    out, printed = calibrate()
    assert '(target 0.50)' in printed
    again, _ = calibrate('--target-rate', '0.5', '--rule', 'rate_matched', '--batches', '8', out='again.pth')
    assert thresholds(again) == thresholds(out)
    twice, _ = calibrate(checkpoint=out, out='twice.pth')
    assert thresholds(twice) == thresholds(out)


def test_sets_what_the_hook_sets(calibrate, run_tool, tiny_config, tmp_path):
    config = tmp_path / 'hook.py'
    config.write_text(
        f"_base_ = '{tiny_config}'\n"
        "custom_hooks = [*_base_.custom_hooks, dict(type='mmdyt.CalibrationHook', rule='global', num_batches=2)]\n"
    )
    run_tool('train', config, '--work-dir', tmp_path / 'work_dir')
    out, _ = calibrate('--rule', 'global', '--batches', '2')
    assert thresholds(out) == thresholds(tmp_path / 'work_dir' / 'iter_6.pth')


def test_tests_of_the_new_checkpoint_follow_its_thresholds(calibrate, run_tool, tiny_config, tmp_path):
    reports = []
    for rate in ('0.2', '1.0'):
        out, _ = calibrate('--target-rate', rate, '--rule', 'uniform')
        reports.append(metrics(run_tool, tiny_config, out, tmp_path / rate))
    low, full = reports
    assert full['activation_rate'] == 1 and low['activation_rate'] < 0.5
    skipped = (1 - low['activation_rate']) * PATCHES * LAYERS
    per_token = 2 * WIDTH * HIDDEN + 5 * WIDTH  # MLP and its norm
    assert (full['gmacs_backbone'] - low['gmacs_backbone']) * 1e9 == pytest.approx(skipped * per_token)
    assert full['mIoU'] != low['mIoU']


@pytest.mark.slow
def test_a_checkpoint_from_before_thresholds_tests_resumes_and_calibrates_alike(
    calibrate, run_tool, tiny_config, trained, tmp_path
):
    content = torch.load(trained / 'iter_6.pth')
    content['state_dict'] = {k: v for k, v in content['state_dict'].items() if k not in THRESHOLDS}
    old = tmp_path / 'old.pth'
    torch.save(content, old)
    expected = metrics(run_tool, tiny_config, trained / 'iter_6.pth', tmp_path / 'new')
    assert metrics(run_tool, tiny_config, old, tmp_path / 'old') == expected
    run_tool('train', tiny_config, '--resume', old, '--work-dir', tmp_path / 'resumed')
    assert thresholds(calibrate(checkpoint=old)[0]) == thresholds(calibrate(out='other.pth')[0])


@pytest.mark.slow
def test_training_goes_on_from_the_new_checkpoint(calibrate, run_tool, tiny_config, tmp_path):
    out, _ = calibrate()
    more = '--cfg-options', 'train_cfg.max_iters=7'
    run_tool('train', tiny_config, '--resume', out, '--work-dir', tmp_path / 'work_dir', *more)
    assert (tmp_path / 'work_dir' / 'iter_7.pth').exists()


def test_what_the_user_typed_is_checked(refused, trained):
    assert 'rule must be one of' in refused('--rule', 'best')
    assert 'target_rate must lie in (0, 1], got 50.0. Rates are fractions' in refused('--target-rate', '50')
    assert 'num_batches must be at least 1, got 0' in refused('--batches', '0')
    assert 'out must name a file in an existing folder, got ' in refused(out='nowhere/out.pth')
    assert 'out must name a file in an existing folder, got ' in refused(out='.')
    assert 'config must name an existing file' in refused(config='configs/no.py')
    assert 'checkpoint must name an existing file, got no.pth' in refused(checkpoint='no.pth')
    options = 'train_dataloader.dataset.data_root=/no', 'train_dataloader.dataset.pipeline.3.type=RandomFlp'
    assert 'train_dataloader.dataset.data_root must name an existing folder' in refused('--cfg-options', options[0])
    assert 'train_dataloader.dataset.pipeline[3].type must be a registered' in refused('--cfg-options', options[1])
    assert 'val_dataloader.dataset.data_root must name' in refused('--cfg-options', options[0].replace('train', 'val'))
    assert 'config must set train_dataloader, got none' in refused('--cfg-options', 'train_dataloader=None')


def test_the_checkpoint_is_not_overwritten(refused, trained, tmp_path):
    (tmp_path / 'same.pth').write_bytes((trained / 'iter_6.pth').read_bytes())
    (tmp_path / 'link.pth').symlink_to(tmp_path / 'same.pth')
    for name in ('same.pth', 'link.pth'):
        message = refused(checkpoint=tmp_path / 'same.pth', out=name)
        assert 'out must name another file than the checkpoint, got ' in message


def test_models_without_thresholds_and_checkpoints_of_other_models_are_refused(refused, trained, tmp_path):
    assert 'checkpoint must fit the model' in refused('--cfg-options', 'model.backbone.arch.num_layers=3',
                                                      'model.backbone.out_indices=[0,1,2]')  # fmt: skip
    content = torch.load(trained / 'iter_6.pth')
    content['state_dict'] = {k: v for k, v in content['state_dict'].items() if '.dispatcher.' not in k}
    torch.save(content, tmp_path / 'adapter.pth')
    message = refused('--cfg-options', 'model.backbone.dispatcher=None', checkpoint=tmp_path / 'adapter.pth')
    assert 'model must have a dispatcher with a threshold, a TokenDispatcher, got none' in message


@pytest.mark.parametrize('rule', ['rate_matched', pytest.param('global', marks=pytest.mark.slow)])
def test_a_cost_can_be_asked_for(calibrate, run_tool, tiny_config, trained, tmp_path, rule):
    """The cost of the test is that of the calibration images, which are as large as those of the test."""
    full = metrics(run_tool, tiny_config, calibrate('--target-rate', '1')[0], tmp_path / 'full')['gmacs']
    least = full - LAYERS * PATCHES * (2 * WIDTH * HIDDEN + 5 * WIDTH) / 1e9
    wanted = 0.4 * full + 0.6 * least
    out, printed = calibrate('--target-gmacs', str(wanted), '--rule', rule, out='cost.pth')
    rates = [float(line.split()[2]) for line in printed.splitlines() if line.startswith('backbone.layers')]
    assert sum(rates) / LAYERS == pytest.approx(0.4, abs=0.02)
    assert re.search(r'^Activation rate 0.\d{3}, by layer', printed, re.M)
    assert metrics(run_tool, tiny_config, out, tmp_path / 'cost')['gmacs'] == pytest.approx(wanted, rel=0.02)


def test_costs_that_cannot_be_had_are_refused(refused):
    assert 'target_gmacs must be a positive number, got -1.0' in refused('--target-gmacs', '-1')
    assert 'target_rate must not be given with target_gmacs' in refused('--target-gmacs', '1', '--target-rate', '0.5')
    assert 'target_gmacs must lie between 0.00' in refused('--target-gmacs', '1000')


def test_a_test_may_calibrate_for_itself(calibrate, run_tool, tiny_config, trained, tmp_path):
    """As the tool and a test of its checkpoint do; the checkpoint stays what it was."""
    before = (trained / 'iter_6.pth').read_bytes()
    out, _ = calibrate('--target-rate', '0.3', '--rule', 'global', '--batches', '2')
    expected = metrics(run_tool, tiny_config, out, tmp_path / 'tool')
    args = '--target-rate', '0.3', '--rule', 'global', '--batches', '2'
    run_tool('test', tiny_config, trained / 'iter_6.pth', '--work-dir', tmp_path / 'test', *args)
    (file,) = (tmp_path / 'test').glob('*/*.json')
    found = {name: value for name, value in json.loads(file.read_text()).items() if not name.endswith('time')}
    assert found == expected and 0.2 < found['activation_rate'] < 0.4
    assert (trained / 'iter_6.pth').read_bytes() == before


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--target-rate', '50'], 'target_rate must lie in (0, 1], got 50.0'),
        (['--target-gmacs', '0'], 'target_gmacs must be a positive number, got 0.0'),
        (['--target-rate', '0.5', '--rule', 'best'], 'rule must be one of'),
        (['--per-image'], '--per-image must come with --target-rate or --target-gmacs, got neither'),
        (['--target-rate', '0.5', '--tta'], 'must not be combined with --tta or --complete'),
        (['--target-rate', '0.5', '--cfg-options', 'train_dataloader=None'], 'config must set train_dataloader, got'),
    ],
)
def test_a_test_refuses_what_the_tool_refuses(run_tool, tiny_config, trained, tmp_path, capfd, args, message):
    with pytest.raises(SystemExit):
        run_tool('test', tiny_config, trained / 'iter_6.pth', '--work-dir', tmp_path, *args)
    assert message in capfd.readouterr().err


def test_every_image_can_be_given_the_rate(calibrate, run_tool, tiny_config, trained, tmp_path):
    args = '--rule', 'uniform', '--target-rate', '0.25'
    out, _ = calibrate(*args, '--per-image')
    rates = [value for name, value in metrics(run_tool, tiny_config, out, tmp_path).items() if '_rate/' in name]
    assert rates == [0.25] * LAYERS
    again, _ = calibrate(*args, checkpoint=out, out='again.pth')
    once, _ = calibrate(*args, out='once.pth')
    assert list(state(again)) == list(state(once)) != list(state(out))
    assert all(torch.equal(state(again)[name], tensor) for name, tensor in state(once).items())
    work_dir = tmp_path / 'now'
    run_tool('test', tiny_config, trained / 'iter_6.pth', '--work-dir', work_dir, *args, '--per-image')
    (file,) = work_dir.glob('*/*.json')
    assert json.loads(file.read_text())['activation_rate'] == 0.25


@pytest.mark.slow
def test_dispatchers_can_be_fitted_to_a_checkpoint_that_has_none(calibrate, run_tool, tiny_config, trained, tmp_path):
    """A plain adapter becomes dynamic without training, with the same gates whatever dispatchers there were before."""
    content = torch.load(trained / 'iter_6.pth')
    content['state_dict'] = {k: v for k, v in content['state_dict'].items() if '.dispatcher.' not in k}
    plain = tmp_path / 'adapter.pth'
    torch.save(content, plain)
    args = '--fit', '--rule', 'global', '--target-rate', '0.4'
    out, printed = calibrate(*args, checkpoint=plain)
    assert 'Fitted dispatchers; explained variance of the log evidence by layer 0.' in printed
    assert re.search(r'^Activation rate 0\.(39|40)', printed, re.M)
    assert all(torch.equal(state(out)[name], tensor) for name, tensor in content['state_dict'].items())
    again = state(calibrate(*args, out='again.pth')[0])
    assert all(torch.equal(again[name], tensor) for name, tensor in state(out).items())
    gates = [f'{branch}.dispatcher.gate.weight' for branch in BRANCHES]
    assert not any(torch.equal(state(trained / 'iter_6.pth')[name], again[name]) for name in gates)
    assert metrics(run_tool, tiny_config, out, tmp_path / 'test')['activation_rate'] == pytest.approx(0.4, abs=0.1)


def test_what_else_is_missing_is_refused_with_fit_too(refused, trained, tmp_path):
    content = torch.load(trained / 'iter_6.pth')
    del content['state_dict']['backbone.layers.0.dynamic.mlp.adapter.up.weight']
    torch.save(content, tmp_path / 'part.pth')
    assert '1 missing' in refused('--fit', checkpoint=tmp_path / 'part.pth')
