"""mmengine's checkpoint hook removes an older checkpoint once the new one is whole, and in its own folder only."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.hooks import CheckpointHook
from mmengine.logging import MessageHub, MMLogger

from mmdyt import compat

compat.install()


class Runner(SimpleNamespace):
    """As much of a runner as the hook wants; a checkpoint is a file with its step, the next one may fail."""

    def save_checkpoint(self, out_dir, filename, *args, **kwargs):
        if self.full:
            raise OSError('disk full')
        Path(out_dir, filename).write_text(str(self.epoch))


def start(work_dir: Path, hub: MessageHub | None = None, **options) -> tuple[CheckpointHook, Runner]:
    work_dir.mkdir(exist_ok=True)
    hub = hub or MessageHub(f'hub of {work_dir}')
    runner = Runner(work_dir=str(work_dir), message_hub=hub, logger=MMLogger.get_instance('x'), epoch=0, iter=0)
    hook = CheckpointHook(interval=1, **options)
    hook.before_train(runner)
    return hook, runner


def epoch(hook: CheckpointHook, runner: Runner, accuracy: float, full: bool = False) -> None:
    runner.full = full
    hook._save_checkpoint(runner)
    runner.epoch += 1
    hook.after_val_epoch(runner, dict(acc=accuracy))


def names(work_dir: Path) -> set[str]:
    return {path.name for path in work_dir.glob('*.pth')}


def test_older_checkpoints_go_when_the_new_one_is_there(tmp_path):
    hook, runner = start(tmp_path / 'run', max_keep_ckpts=1, save_best='acc')
    for accuracy in (1.0, 2.0, 1.5):
        epoch(hook, runner, accuracy)
    assert names(tmp_path / 'run') == {'epoch_3.pth', 'best_acc_epoch_2.pth'}
    assert (tmp_path / 'run' / 'last_checkpoint').read_text().endswith('epoch_3.pth')


@pytest.mark.parametrize('step', ['_save_checkpoint', 'best'])
def test_a_full_disk_leaves_the_older_ones(step, tmp_path):
    hook, runner = start(tmp_path / 'run', max_keep_ckpts=1, save_best='acc')
    epoch(hook, runner, 1.0)
    kept = names(tmp_path / 'run')
    runner.full = True
    with pytest.raises(OSError, match='disk full'):
        hook._save_checkpoint(runner) if step != 'best' else hook.after_val_epoch(runner, dict(acc=2.0))
    assert names(tmp_path / 'run') == kept == {'epoch_1.pth', 'best_acc_epoch_1.pth'}
    assert (tmp_path / 'run' / 'last_checkpoint').read_text().endswith('epoch_1.pth')


def test_a_copied_run_leaves_the_original_alone(tmp_path):
    hook, runner = start(tmp_path / 'run', max_keep_ckpts=1, save_best='acc')
    epoch(hook, runner, 1.0)
    shutil.copytree(tmp_path / 'run', tmp_path / 'copy')
    original = names(tmp_path / 'run')
    hook, resumed = start(tmp_path / 'copy', runner.message_hub, max_keep_ckpts=1, save_best='acc')
    resumed.epoch = 1
    epoch(hook, resumed, 2.0)
    assert names(tmp_path / 'run') == original
    assert names(tmp_path / 'copy') == {'epoch_2.pth', 'best_acc_epoch_2.pth'}


def test_a_best_checkpoint_that_is_written_again_stays(tmp_path):
    hook, runner = start(tmp_path / 'run', save_best='acc')
    epoch(hook, runner, 1.0)
    hook.after_val_epoch(runner, dict(acc=2.0))
    assert 'best_acc_epoch_1.pth' in names(tmp_path / 'run')
