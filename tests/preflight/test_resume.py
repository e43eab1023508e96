"""Which checkpoint a run goes on from, that nothing of its state is missing, and what was changed."""

import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmdyt import preflight
from mmdyt.preflight.checkpoints import check_resumable
from mmdyt.preflight.resume import changes, latest_checkpoint

SCHEDULES = [dict(type='PolyLR', begin=0, end=6), dict(type='LinearLR', end=2)]
SETTINGS = dict(
    optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1), clip_grad=dict(max_norm=1.0)),
    param_scheduler=SCHEDULES,
    train_cfg=dict(by_epoch=True, max_epochs=4),
    train_dataloader=dict(batch_size=5, num_workers=0, dataset=dict(type='A')),
    work_dir='here',
)


def write(folder: Path, **files: str) -> Path:
    """``whole`` is a checkpoint, ``cut`` one whose end is missing; anything else is a text."""
    for name, content in files.items():
        path = folder / name.replace('__', '.')
        if content in ('whole', 'cut'):
            torch.save(dict(state_dict=dict(a=torch.zeros(1000))), path)
            if content == 'cut':
                path.write_bytes(path.read_bytes()[:-200])
        else:
            path.write_text(content)
    return folder


@pytest.mark.parametrize(
    ('files', 'expected', 'said'),
    [
        (dict(last_checkpoint='/elsewhere/epoch_2.pth', epoch_1__pth='whole', epoch_2__pth='whole'), 'epoch_2', False),
        (dict(last_checkpoint='run/epoch_1.pth\n', epoch_1__pth='whole', epoch_2__pth='whole'), 'epoch_1', False),
        (dict(last_checkpoint='', epoch_9__pth='whole', epoch_10__pth='whole'), 'epoch_10', True),
        (dict(epoch_1__pth='whole', epoch_2__pth='whole', best_acc_epoch_1__pth='whole'), 'epoch_2', True),
        (dict(last_checkpoint='epoch_3.pth', epoch_1__pth='whole', epoch_2__pth='whole'), 'epoch_2', True),
        (dict(last_checkpoint='epoch_2.pth', epoch_1__pth='whole', epoch_2__pth='cut'), 'epoch_1', True),
        (dict(epoch_1__pth='whole', epoch_2__pth='cut', epoch_3__pth=''), 'epoch_1', True),
        (dict(iter_100__pth='whole', epoch_2__pth='whole'), 'epoch_2', True),
        (dict(iter_100__pth='whole'), 'iter_100', True),
        ({}, None, False),
    ],
)
def test_the_latest_whole_checkpoint_of_the_folder_is_found(files, expected, said, tmp_path, capsys):
    folder = write(tmp_path, **files)
    found = latest_checkpoint(Config(dict(work_dir=str(folder))))
    assert found == (expected and str(folder / f'{expected}.pth'))
    assert ('names no whole checkpoint; the run goes on from' in capsys.readouterr().err) == said


def test_a_copied_or_moved_run_goes_on_from_its_own_checkpoints(tmp_path):
    (tmp_path / 'run').mkdir()
    write(tmp_path / 'run', last_checkpoint=str(tmp_path / 'run' / 'epoch_1.pth'), epoch_1__pth='whole')
    shutil.copytree(tmp_path / 'run', tmp_path / 'copy')
    (tmp_path / 'run').rename(tmp_path / 'moved')
    for name in ('copy', 'moved'):
        assert latest_checkpoint(Config(dict(work_dir=str(tmp_path / name)))) == str(tmp_path / name / 'epoch_1.pth')


def test_checkpoints_in_a_folder_of_their_own_are_found(tmp_path):
    for folder in ('run', 'out/run'):
        (tmp_path / folder).mkdir(parents=True)
    write(tmp_path / 'run', last_checkpoint=str(tmp_path / 'out' / 'run' / 'x3.pth'))
    write(tmp_path / 'out' / 'run', x3__pth='whole')
    hook = dict(out_dir=str(tmp_path / 'out'), filename_tmpl='x{}.pth')
    cfg = Config(dict(work_dir=str(tmp_path / 'run'), default_hooks=dict(checkpoint=hook)))
    assert latest_checkpoint(cfg) == str(tmp_path / 'out' / 'run' / 'x3.pth')
    (tmp_path / 'run' / 'last_checkpoint').write_text('s3://bucket/run/x3.pth')
    assert latest_checkpoint(cfg) == 's3://bucket/run/x3.pth'  # mmengine's to fetch


@pytest.mark.parametrize(
    'files', [dict(last_checkpoint='epoch_1.pth'), dict(epoch_1__pth='cut'), dict(epoch_1__pth='')]
)
def test_without_a_whole_checkpoint_nothing_starts_over_unasked(files, tmp_path):
    with pytest.raises(ValueError, match='--resume must find a whole checkpoint in .*, got none'):
        latest_checkpoint(Config(dict(work_dir=str(write(tmp_path, **files)))))


def test_a_config_may_ask_to_resume_itself(tmp_path):
    cfg = Config(dict(work_dir=str(tmp_path), resume=True, load_from=None))
    preflight.set_resume(cfg, None)
    assert not cfg.resume and cfg.load_from is None
    write(tmp_path, epoch_1__pth='whole')
    cfg.resume = True
    preflight.set_resume(cfg, None)
    assert cfg.resume and cfg.load_from == str(tmp_path / 'epoch_1.pth')


@pytest.fixture
def cfg(tiny_config) -> Config:
    args = Namespace(config=tiny_config, cfg_options=None, work_dir='x', launcher='none', local_rank=0)
    return preflight.load_config(args)


@pytest.mark.parametrize('part', ['meta', 'message_hub', 'optimizer', 'param_schedulers', 'rng_state'])
def test_a_checkpoint_without_a_part_of_the_state_is_refused(part, cfg, trained, tmp_path):
    content = torch.load(trained / 'iter_3.pth')
    del content[part]
    torch.save(content, tmp_path / 'x.pth')
    with pytest.raises(ValueError, match=f'state of training to resume from, got .* without {part}. To start from'):
        check_resumable(str(tmp_path / 'x.pth'), cfg)


def test_what_a_config_does_not_use_may_be_missing(cfg, trained, tmp_path):
    content = torch.load(trained / 'iter_3.pth')
    del content['param_schedulers'], content['rng_state']
    torch.save(content, tmp_path / 'x.pth')
    cfg.param_scheduler, cfg.custom_hooks = None, []
    check_resumable(str(tmp_path / 'x.pth'), cfg)


@pytest.mark.parametrize(
    ('change', 'expected'),
    [
        ({}, []),
        ({'optim_wrapper.optimizer.lr': 0.2}, [('optim_wrapper.optimizer.lr', 0.1, 0.2)]),
        ({'optim_wrapper.optimizer.type': 'AdamW'}, [('optim_wrapper.optimizer.type', 'SGD', 'AdamW')]),
        ({'optim_wrapper.clip_grad.max_norm': 2.0}, [('optim_wrapper.clip_grad.max_norm', 1.0, 2.0)]),
        ({'optim_wrapper.optimizer.momentum': 0.9}, [('optim_wrapper.optimizer.momentum', 'not set', 0.9)]),
        ({'param_scheduler.0.end': 9}, [('param_scheduler.0.end', 6, 9)]),
        ({'param_scheduler.1.end': float('inf')}, [('param_scheduler.1.end', 2, 'inf')]),
        ({'param_scheduler': SCHEDULES[:1]},
         [('param_scheduler.1.type', 'LinearLR', 'not set'), ('param_scheduler.1.end', 2, 'not set')]),
        ({'train_cfg.max_epochs': 8}, [('train_cfg.max_epochs', 4, 8)]),
        ({'train_dataloader.batch_size': 6}, [('train_dataloader.batch_size', 5, 6)]),
        ({'train_dataloader.num_workers': 2}, [('train_dataloader.num_workers', 0, 2)]),
        ({'train_dataloader.dataset.type': 'B', 'work_dir': 'there'}, []),
    ],
)  # fmt: skip
def test_changed_settings_of_optimization_are_found(change, expected):
    before, after = Config(SETTINGS), Config(SETTINGS)
    after.merge_from_dict(change)
    if isinstance(change.get('param_scheduler'), list):
        after.param_scheduler = change['param_scheduler']
    assert sorted(changes(before.pretty_text, after.pretty_text)) == sorted(expected)


@pytest.mark.parametrize('text', ['', 'no config of mmengine (', 'import os'])
def test_a_text_that_cannot_be_read_says_nothing(text):
    assert changes(text, Config(SETTINGS).pretty_text) == []


def test_changed_settings_are_said_with_what_becomes_of_them(cfg, trained, capsys):
    path = str(trained / 'iter_3.pth')
    check_resumable(path, cfg)
    assert not capsys.readouterr().err
    cfg.optim_wrapper.optimizer.lr, cfg.train_cfg.max_iters = 0.5, 9
    check_resumable(path, cfg)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f'warning: optim_wrapper.optimizer.lr is 0.5 now, was 0.001, and stays 0.001: its state is in {path}.',
        f'warning: train_cfg.max_iters is 9 now, was 6 in {path}.',
    ]


def test_a_run_without_a_seed_goes_on_with_the_one_that_it_drew(cfg, trained, tmp_path):
    content = torch.load(trained / 'iter_3.pth')
    content['meta']['seed'] = 77
    torch.save(content, tmp_path / 'x.pth')
    check_resumable(str(tmp_path / 'x.pth'), cfg)
    assert cfg.randomness.seed == 0
    cfg.randomness = dict(diff_rank_seed=True)
    check_resumable(str(tmp_path / 'x.pth'), cfg)
    assert cfg.randomness == dict(diff_rank_seed=True, seed=77)
