"""docs/own_data.md: its commands run as they stand, on drawn data, in a folder without the repository."""

import re
import shlex
import sys
from pathlib import Path

import cv2
import pytest
import torch
from conftest import ROOT, forget_runs, load_tool
from own_worlds import DRAW, NAMES

from mmdyt.preflight.checkpoints import read_checkpoint

PAGE = ROOT / 'docs/own_data.md'
BLOCKS = re.findall(r'```bash\n(.*?)```', PAGE.read_text(), re.DOTALL)
LOADERS = 'train', 'val', 'test'
# the commands name what takes hours; a test takes less of the same
LESS = {'epoch_30': 'epoch_2', 'iter_2000': 'iter_2'}
IN_PROCESS = 'num_workers=0', 'persistent_workers=False'
SMALL = ['own.size=32', *(f'{name}_dataloader.{key}' for name in LOADERS for key in IN_PROCESS)]
STEPS = ['train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'param_scheduler.0.end=1', 'param_scheduler.1.begin=1']
SHORT = dict(segmentation=STEPS)


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """Where a reader stands: the repository's folders, data, weights; ViT-Ti/16 with random ones."""
    from mmengine.registry import MODELS

    import mmdyt.models  # noqa: F401  repairs the wheels, registers

    made = tmp_path_factory.mktemp('own')
    for name in ('configs', 'tools'):
        (made / name).symlink_to(ROOT / name)
    (made / 'pretrain').mkdir()
    backbone = MODELS.build(dict(type='mmpretrain.VisionTransformer', arch='deit-tiny', img_size=224, patch_size=16))
    state = {f'backbone.{name}': value for name, value in backbone.state_dict().items()}
    torch.save(dict(state_dict=state), made / 'pretrain/vit_tiny_patch16_224.pth')
    return made


def run(folder: Path, command: str, more=()) -> None:
    """One line of the page, by the tool's own main."""
    for old, new in LESS.items():
        command = command.replace(old, new)
    python, tool, *args = shlex.split(command)
    assert python == 'python'
    forget_runs()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, 'argv', [tool, *args, *(more if '--cfg-options' in args else ())])
        load_tool(Path(tool).stem).main()


def test_there_is_a_tutorial_for_each_task():
    assert [re.search(r'configs/own/(\w+)', block)[1] for block in BLOCKS] == list(DRAW)


@pytest.mark.parametrize(('task', 'block'), list(zip(DRAW, BLOCKS, strict=True)), ids=list(DRAW))
def test_the_commands_run(task, block, folder, capsys):
    (data,) = set(re.findall(r'own\.root=(\S+)', block))
    DRAW[task](folder / data)
    name = Path(data).name
    more = SMALL + SHORT.get(task, ['train_cfg.max_epochs=2'])
    for command in block.strip().splitlines():
        run(folder, command, more)
    printed = capsys.readouterr().out
    sheet = cv2.imread(str(folder / f'work_dirs/{name}_seen/train_contact.png'))
    assert sheet is not None and sheet.std() > 20
    (checkpoint,) = (folder / 'work_dirs' / name).glob(f'{"iter" if task == "segmentation" else "epoch"}_2.pth')
    meta = read_checkpoint(str(checkpoint))['meta']
    assert tuple(meta['dataset_meta']['classes']) == NAMES
    kept = (folder / f'work_dirs/{name}/{task}.py').read_text()
    for text in (kept, meta['cfg']):
        assert not re.search(r"'own\.", text) and not re.search(r'^own =', text, re.MULTILINE)
    assert '_base_' not in kept and f'num_classes={len(NAMES)}' in kept
    if task == 'video':
        assert any(label in printed.splitlines()[-1] for label in NAMES)
    else:
        lines = (folder / f'work_dirs/{name}_predicted/predictions.jsonl').read_text().splitlines()
        assert len(lines) == dict(classification=6, segmentation=2)[task]


def test_a_kept_config_and_a_checkpoint_need_no_data(folder, tmp_path, monkeypatch, capsys):
    """Runs after the tutorials, elsewhere: the class names come from the checkpoint."""
    work_dir = folder / 'work_dirs/flowers'
    picture = folder / 'data/flowers/val/red/0.png'
    monkeypatch.chdir(tmp_path)
    for config in ((), (work_dir / 'classification.py',)):
        forget_runs()
        monkeypatch.setattr(sys, 'argv', ['tools/predict.py', *map(str, [*config, work_dir / 'epoch_2.pth', picture])])
        load_tool('predict').main()
        assert any(name in capsys.readouterr().out for name in NAMES)
