"""A resumed run repeats the unbroken one, number by number."""

import gc
import json
from pathlib import Path
from types import SimpleNamespace

import torch

from mmdyt.engine.rng_state import RNGStateHook, get_random_states

ROOT = Path(__file__).parents[2]
EPOCHS_CONFIG = """
_base_ = '{root}/configs/_base_/runtime/mmpretrain.py'
custom_hooks = [dict(type='mmdyt.RNGStateHook')]
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(num_classes=2, mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    backbone=dict(
        type='VisionTransformer', arch=dict(embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=16),
        img_size=32, patch_size=16, drop_rate=0.5),
    head=dict(type='VisionTransformerClsHead', num_classes=2, in_channels=16))
crop = [dict(type='LoadImageFromFile'), dict(type='RandomCrop', crop_size=32), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=5, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='CustomDataset', data_root='{data}', data_prefix='images', pipeline=crop))
val_dataloader = train_dataloader  # random crops: it draws from the generators too
val_evaluator = dict(type='Accuracy')
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))
train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=1)
val_cfg = dict()
default_hooks = dict(checkpoint=dict(interval=2), logger=dict(interval=1))
log_processor = dict(window_size=1)
"""


def losses(work_dir: Path) -> list[float]:
    """Loss of every logged iteration of all runs in a work dir, unrounded."""
    lines = [line for log in sorted(work_dir.glob('*/vis_data/scalars.json')) for line in log.read_text().splitlines()]
    return [row['loss'] for row in map(json.loads, lines) if 'loss' in row]


def test_resumed_run_repeats_the_unbroken_one(run_tool, tiny_config, trained, tmp_path):
    unbroken = losses(trained)
    assert len(set(unbroken)) == 6
    run_tool('train', tiny_config, '--work-dir', tmp_path, '--cfg-options', 'train_cfg.max_iters=3')
    assert losses(tmp_path) == unbroken[:3]
    run_tool('train', tiny_config, '--work-dir', tmp_path, '--resume')
    assert losses(tmp_path) == unbroken


def test_resumed_run_repeats_the_unbroken_one_with_workers(run_tool, tiny_config, tmp_path, monkeypatch):
    # how long torch waits for each worker of an abandoned loader, 5 s
    monkeypatch.setattr('torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL', 0.1)
    workers = '--cfg-options', 'train_dataloader.num_workers=2', 'val_dataloader.num_workers=2'
    run_tool('train', tiny_config, '--work-dir', tmp_path / 'unbroken', *workers)
    resume = '--resume', tmp_path / 'unbroken' / 'iter_3.pth'
    run_tool('train', tiny_config, '--work-dir', tmp_path / 'resumed', *resume, *workers)
    gc.collect()  # now, while the wait is short
    assert losses(tmp_path / 'resumed') == losses(tmp_path / 'unbroken')[3:]


def test_without_the_hook_the_resumed_run_differs(run_tool, tiny_config, trained, tmp_path):
    config = tmp_path / 'without.py'
    config.write_text(f"_base_ = ['{tiny_config}']\ncustom_hooks = []\n")
    run_tool('train', config, '--work-dir', tmp_path, '--resume', trained / 'iter_3.pth')
    resumed, unbroken = losses(tmp_path), losses(trained)[3:]
    assert len(resumed) == 3 and not set(resumed) & set(unbroken)


def test_resumed_epochs_repeat_the_unbroken_ones(run_tool, tmp_path, ade_root):
    config = tmp_path / 'epochs.py'
    config.write_text(EPOCHS_CONFIG.format(root=ROOT, data=ade_root))
    run_tool('train', config, '--work-dir', tmp_path / 'unbroken')
    resume = '--resume', tmp_path / 'unbroken' / 'epoch_2.pth'
    run_tool('train', config, '--work-dir', tmp_path / 'resumed', *resume)
    unbroken = losses(tmp_path / 'unbroken')
    assert len(set(unbroken)) == 8  # 10 images, 5 a step, 4 epochs
    assert losses(tmp_path / 'resumed') == unbroken[4:]


def test_states_load_with_the_safety_of_torch_on(trained):
    states = torch.load(trained / 'iter_3.pth', weights_only=True)['rng_state']
    assert states.keys() == {'python', 'numpy', 'torch', 'cuda'}


def draw_after_resuming(monkeypatch, rank: int, iteration: int, checkpoint: dict) -> float:
    monkeypatch.setattr('mmdyt.engine.rng_state.get_rank', lambda: rank)
    runner, hook = SimpleNamespace(iter=iteration), RNGStateHook()
    hook.after_load_checkpoint(runner, checkpoint)
    hook.before_train_iter(runner, 0)
    return torch.rand(1).item()


def test_other_ranks_are_seeded_by_their_rank(monkeypatch):
    checkpoint = dict(rng_state=get_random_states())
    draws = [draw_after_resuming(monkeypatch, rank, 3, checkpoint) for rank in (0, 1, 2, 0, 1, 2)]
    assert len(set(draws)) == 3 and draws[:3] == draws[3:]


def test_a_new_run_from_old_weights_keeps_its_own_random_numbers(monkeypatch):
    checkpoint = dict(rng_state=get_random_states())
    torch.rand(1)
    expected = torch.Generator()
    expected.set_state(torch.get_rng_state())
    assert draw_after_resuming(monkeypatch, 0, 0, checkpoint) == torch.rand(1, generator=expected).item()


def test_checkpoints_without_states_load(monkeypatch):
    draw_after_resuming(monkeypatch, 0, 3, {})
