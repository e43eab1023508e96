"""Tuned-only files in train, test, predict, calibrate, and tools/tuned.py."""

import json
from pathlib import Path

import pytest
import torch
from predicting import make_checkpoint

from mmdyt.tuned.file import read

HOOK = 'default_hooks.checkpoint.type=mmdyt.TunedCheckpointHook'


def refused(run_tool, capfd, *args) -> str:
    """What a tool says that ends with exit code 2."""
    with pytest.raises(SystemExit) as exit_info:
        run_tool(*args)
    assert exit_info.value.code == 2
    return capfd.readouterr().err


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope='module')
def runs(tiny_cls_config, tmp_path_factory, run_tool):
    """Work dirs of one run that wrote whole checkpoints, and one that wrote tuned-only ones, after epochs 1 and 2."""
    folders = {}
    for name, options in dict(whole=[], tuned=[HOOK, 'default_hooks.checkpoint.save_optimizer=True']).items():
        folders[name] = tmp_path_factory.mktemp(name)
        length = ['train_cfg.max_epochs=2', 'train_cfg.val_interval=2', 'default_hooks.checkpoint.interval=1']
        run_tool('train', tiny_cls_config, '--work-dir', folders[name], '--cfg-options', *length, *options)
    return tiny_cls_config, folders['whole'], folders['tuned']


def test_the_hook_writes_what_extract_makes_of_a_checkpoint(runs, run_tool, tmp_path, capfd):
    config, whole, tuned = runs
    assert sorted(path.name for path in tuned.glob('epoch*')) == ['epoch_1.safetensors', 'epoch_2.safetensors']
    out = tmp_path / 'x.safetensors'
    run_tool('tuned', 'extract', whole / 'epoch_2.pth', out, '--optimizer')
    assert 'instead of' in capfd.readouterr().out
    one, other = read(out), read(tuned / 'epoch_2.safetensors')
    assert equal(one['state_dict'], other['state_dict']) and 'optimizer' in one
    assert one['tuned']['base'] == other['tuned']['base'] and one['tuned']['method'] == other['tuned']['method']
    run_tool('tuned', 'diff', out, tuned / 'epoch_2.safetensors')
    assert 'They are equal.' in capfd.readouterr().out
    with pytest.raises(SystemExit) as exit_info:
        run_tool('tuned', 'diff', out, tuned / 'epoch_1.safetensors')
    told = capfd.readouterr().out
    assert exit_info.value.code == 1 and 'head.layers.head.weight: at most' in told and 'ln1' not in told


def test_apply_gives_the_checkpoint_back(runs, run_tool, tmp_path, capfd):
    _, whole, tuned = runs
    run_tool('tuned', 'apply', tuned / 'epoch_2.safetensors', tmp_path / 'x.pth')
    back, there = torch.load(tmp_path / 'x.pth'), torch.load(whole / 'epoch_2.pth')
    assert equal(back['state_dict'], there['state_dict'])
    assert back.keys() == there.keys() and back['meta']['epoch'] == 2
    capfd.readouterr()
    run_tool('tuned', 'info', tuned / 'epoch_2.safetensors')
    told = capfd.readouterr().out
    for words in ('4 Adapter(scale=1), 4 TokenDispatcher', 'tiny_vit.pth', 'size [32, 32]', 'epoch 2', 'resumes  yes'):
        assert words in told


def test_training_resumes_from_a_file_with_the_optimizer(runs, run_tool, tmp_path):
    config, _, tuned = runs
    options = ['train_cfg.max_epochs=2', 'train_cfg.val_interval=2', HOOK]
    file = tuned / 'epoch_1.safetensors'
    run_tool('train', config, '--work-dir', tmp_path, '--resume', file, '--cfg-options', *options)
    last = Path((tmp_path / 'last_checkpoint').read_text())
    assert last.name == 'epoch_2.safetensors' and 'optimizer' not in read(last)
    assert equal(read(last)['state_dict'], read(tuned / 'epoch_2.safetensors')['state_dict'])


@pytest.mark.slow
def test_training_does_not_resume_without_it_but_starts_from_it(runs, run_tool, tmp_path, capfd):
    config, whole, _ = runs
    out = tmp_path / 'x.safetensors'
    run_tool('tuned', 'extract', config, whole / 'epoch_2.pth', out)
    told = refused(run_tool, capfd, 'train', config, '--work-dir', tmp_path / 'a', '--resume', out)
    assert f'got {out} without message_hub, optimizer' in told and not (tmp_path / 'a').exists()
    options = ['train_cfg.max_epochs=1', 'train_cfg.val_interval=1', 'optim_wrapper.optimizer.lr=0.0', HOOK]
    run_tool('train', config, '--work-dir', tmp_path / 'b', '--cfg-options', f'load_from={out}', *options)
    assert equal(read(tmp_path / 'b' / 'epoch_1.safetensors')['state_dict'], read(out)['state_dict'])


@pytest.mark.slow
def test_resume_without_a_name_finds_the_latest_whole_file(runs, run_tool, tmp_path):
    config, _, tuned = runs
    for path in [*tuned.glob('epoch*'), tuned / 'last_checkpoint']:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    broken = tmp_path / 'epoch_2.safetensors'
    broken.write_bytes(broken.read_bytes()[:-10])
    options = ['train_cfg.max_epochs=2', 'train_cfg.val_interval=2', HOOK]
    run_tool('train', config, '--work-dir', tmp_path, '--resume', '--cfg-options', *options)
    assert equal(read(broken)['state_dict'], read(tuned / 'epoch_2.safetensors')['state_dict'])


def metrics(folder: Path) -> dict:
    (file,) = folder.glob('*/*.json')
    return json.loads(file.read_text())


def test_test_and_predict_take_a_file_for_a_checkpoint(runs, run_tool, tmp_path, capfd):
    config, whole, tuned = runs
    found = []
    for name, checkpoint in dict(a=whole / 'epoch_2.pth', b=tuned / 'epoch_2.safetensors').items():
        run_tool('test', config, checkpoint, '--work-dir', tmp_path / name)
        capfd.readouterr()
        run_tool('predict', checkpoint, config.parent / 'test0.png', '--json', '--device', 'cpu')
        found.append((metrics(tmp_path / name), capfd.readouterr().out))
    for one in found:
        for key in ('time', 'data_time'):
            one[0].pop(key, None)
    assert found[0] == found[1] and '"top"' in found[0][1]


def test_a_file_is_calibrated_to_a_file_or_a_whole_checkpoint(runs, run_tool, tmp_path):
    config, _, tuned = runs
    file = tuned / 'epoch_2.safetensors'
    for name in ('x.safetensors', 'x.pth'):
        run_tool('calibrate', config, file, tmp_path / name, '--target-rate', 0.6, '--batches', 1)
    run_tool('tuned', 'extract', tmp_path / 'x.pth', tmp_path / 'y.safetensors')
    one, other = read(tmp_path / 'x.safetensors'), read(tmp_path / 'y.safetensors')
    assert equal(one['state_dict'], other['state_dict']) and 'tuned' in one
    assert not equal(one['state_dict'], read(file)['state_dict'])


def test_what_cannot_be_done_is_refused_before(tiny_cls_config, run_tool, tmp_path, capfd):
    whole, out = make_checkpoint(tiny_cls_config, tmp_path), tmp_path / 'x.safetensors'
    run_tool('tuned', 'extract', whole, out)
    content = out.read_bytes()
    for words, *args in (
        ('must end in .safetensors', 'extract', whole, tmp_path / 'x.pth'),
        ('must end in .pth', 'apply', out, tmp_path / 'y.safetensors'),
        ('must not be a tuned-only file', 'extract', out, tmp_path / 'y.safetensors'),
        ('must be a tuned-only file', 'info', whole),
        ('must be a tuned-only file', 'diff', out, whole),
        ('must find the state of training', 'extract', whole, out, '--optimizer'),
        ('OUT must name a file in an existing folder', 'apply', out, tmp_path / 'none' / 'y.pth'),
        ('must be of the model', 'apply', tiny_cls_config, out, tmp_path / 'y.pth', '--method', 'lora'),
    ):
        assert words in refused(run_tool, capfd, 'tuned', *args)
    assert out.read_bytes() == content and not (tmp_path / 'y.pth').exists()
    options = [HOOK, 'default_hooks.checkpoint.save_optimizer=True', 'custom_hooks.0.type=EMAHook']
    args = ['train', tiny_cls_config, '--work-dir', tmp_path / 'w', '--cfg-options', *options]
    assert 'save_optimizer must be False with an EMAHook' in refused(run_tool, capfd, *args)
    for args in (['train', tiny_cls_config], ['test', tiny_cls_config, out]):
        told = refused(run_tool, capfd, *args, '--cfg-options', 'runner_type=FlexibleRunner', HOOK)
        assert 'runner_type must be Runner with mmdyt.TunedCheckpointHook' in told
    told = refused(run_tool, capfd, 'test', tiny_cls_config, out, '--cfg-options', 'runner_type=FlexibleRunner')
    assert 'checkpoint must be whole with FlexibleRunner' in told


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(filename_tmpl='x_{}.pth'), 'filename_tmpl must end in .safetensors'),
        (dict(published_keys=['meta']), 'published_keys must be None'),
    ],
)
def test_arguments_of_the_hook(options, message):
    from mmdyt.engine import TunedCheckpointHook

    with pytest.raises(ValueError, match=message):
        TunedCheckpointHook(**options)
