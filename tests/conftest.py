"""A tiny world for the tests: data, a pre-trained base and a config built on the repository's own bases."""

import importlib.util
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from tiny_configs import TINY_ARCH, TINY_CLS_CONFIG, TINY_CONFIG, TINY_VIDEO_CONFIG

# tensors as small as these gain nothing from threads, and on a busy machine lose much; before torch is imported
os.environ.setdefault('OMP_NUM_THREADS', '1')
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='session')
def ade_root(tmp_path_factory) -> Path:
    """6 training and 4 validation images of 64 x 96 in ADE20K layout; labels 1 to 3, and 0, which is ignored."""
    import cv2
    import numpy as np

    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp('ade')
    for split, count in (('training', 6), ('validation', 4)):
        for kind in ('images', 'annotations'):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            labels = np.kron(rng.integers(0, 4, (4, 6)), np.ones((16, 16))).astype(np.uint8)
            image = labels[..., None] * 60 + rng.integers(0, 60, (64, 96, 3))
            cv2.imwrite(str(root / 'images' / split / f'{i}.png'), image)
            cv2.imwrite(str(root / 'annotations' / split / f'{i}.png'), labels)
    return root


@pytest.fixture(scope='session')
def pretrained(tmp_path_factory) -> Path:
    """Checkpoint of a plain mmpretrain ``ImageClassifier`` of ``TINY_ARCH`` at 32 x 32: positions will be resized."""
    import torch
    from mmengine.registry import MODELS

    import mmdyt.models  # noqa: F401  repairs the wheels, registers

    torch.manual_seed(0)
    backbone = dict(type='mmpretrain.VisionTransformer', arch=dict(TINY_ARCH), img_size=32, patch_size=16)
    head = dict(type='mmpretrain.VisionTransformerClsHead', num_classes=5, in_channels=TINY_ARCH['embed_dims'])
    model = MODELS.build(dict(_scope_='mmpretrain', type='ImageClassifier', backbone=backbone, head=head))
    model.init_weights()
    path = tmp_path_factory.mktemp('pretrained') / 'tiny_vit.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    return path


@pytest.fixture(scope='session')
def tiny_config(tmp_path_factory, ade_root, pretrained) -> Path:
    """A config file: 6 iterations of Dynamic Tuning (DyT), a checkpoint and a validation after 3 and 6."""
    path = tmp_path_factory.mktemp('configs') / 'tiny.py'
    path.write_text(TINY_CONFIG.format(root=ROOT, arch=TINY_ARCH, data=ade_root, pretrained=pretrained))
    return path


@pytest.fixture(scope='session')
def tiny_cls_config(tmp_path_factory, pretrained) -> Path:
    """Three classes told apart by their colour, 18 training and 9 test images, lists of "path label"."""
    import cv2
    import numpy as np

    folder = tmp_path_factory.mktemp('cls')
    rng = np.random.default_rng(0)
    for split, count in (('train', 18), ('test', 9)):
        lines = []
        for i in range(count):
            image = rng.integers(0, 60, (20, 24, 3))
            image[..., i % 3] += 180
            cv2.imwrite(str(folder / f'{split}{i}.png'), image.astype(np.uint8))
            lines.append(f'{split}{i}.png {i % 3}')
        (folder / f'{split}.txt').write_text('\n'.join(lines) + '\n')
    path = folder / 'config.py'
    path.write_text(TINY_CLS_CONFIG.format(root=ROOT, arch=TINY_ARCH, data=folder, pretrained=pretrained))
    return path


@pytest.fixture(scope='session')
def tiny_video_config(tmp_path_factory, pretrained) -> Path:
    """Three classes of clips told apart by their colour: 9 to train on, 6 to test on, of 12 frames of 40 x 32."""
    import numpy as np

    folder = tmp_path_factory.mktemp('clips')
    (folder / 'videos').mkdir()
    rng = np.random.default_rng(0)
    for split, count in (('train', 9), ('val', 6)):
        lines = []
        for i in range(count):
            frames = rng.integers(0, 60, (12, 32, 40, 3))
            frames[..., i % 3] += 180
            write_clip(folder / 'videos' / f'{split}{i}.mp4', frames.astype(np.uint8))
            lines.append(f'{split}{i}.mp4 {i % 3}')
        (folder / f'{split}.txt').write_text('\n'.join(lines) + '\n')
    path = folder / 'config.py'
    path.write_text(TINY_VIDEO_CONFIG.format(root=ROOT, arch=TINY_ARCH, data=folder, pretrained=pretrained))
    return path


@pytest.fixture
def tiny_model_cfg(tiny_config):
    """``model`` of the tiny config, ready for ``MODELS.build``: its host's scope is the default one."""
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope('mmseg'):
        yield Config.fromfile(tiny_config).model


def write_clip(path, frames, fps: int = 30) -> None:
    """Write RGB frames, (T, H, W, 3) in 8 bits, as MPEG-4 video: the same file every time."""
    import cv2

    height, width = frames.shape[1:3]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'mp4v'), fps, (width, height))
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()


def forget_runs() -> None:
    """Drop what outlives a run in its process: its default scope, loggers, message hub, visualizer."""
    if 'mmengine' not in sys.modules:
        return
    from mmengine.utils import ManagerMixin

    kinds = [ManagerMixin]
    for kind in kinds:
        kind._instance_dict.clear()
        kinds += kind.__subclasses__()


@pytest.fixture(autouse=True)
def no_traces_of_runs():
    """Every test starts as a fresh process would."""
    yield
    forget_runs()


def load_tool(name: str) -> ModuleType:
    """Import ``tools/<name>.py``, which is no package."""
    spec = importlib.util.spec_from_file_location(f'tools_{name}', ROOT / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='session')
def run_tool():
    """``run_tool('train', config, '--work-dir', folder, ...)`` runs a tool in this process, as a fresh one would."""

    def run(name: str, *args) -> None:
        forget_runs()  # loggers and the like are named after the second in which a run starts
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            patch.setattr(sys, 'argv', [f'tools/{name}.py', *map(str, args)])
            load_tool(name).main()

    return run


def run_distributed(tool: str, config: Path, *args) -> None:
    """Run ``tools/dist_<tool>.sh``; modules beside the config can be imported."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    env = os.environ | dict(PYTHON=sys.executable, PYTHONPATH=str(config.parent), PORT=str(port), OMP_NUM_THREADS='1')
    command = ['bash', ROOT / 'tools' / f'dist_{tool}.sh', config, *map(str, args)]
    result = subprocess.run(command, cwd=config.parent, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope='session')
def trained(tmp_path_factory, tiny_config, run_tool) -> Path:
    """Work dir of an unbroken training run of the tiny config: ``iter_3.pth``, ``iter_6.pth`` and its logs."""
    work_dir = tmp_path_factory.mktemp('trained')
    run_tool('train', tiny_config, '--work-dir', work_dir)
    return work_dir


def pytest_terminal_summary(terminalreporter) -> None:
    """Print how the hostile inputs went, by their kind; see tests/hostile."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    pairs = [getattr(report, 'user_properties', []) for report in reports if getattr(report, 'when', '') == 'call']
    went = Counter(value for properties in pairs for key, value in properties if key == 'hostile')
    if not went:
        return
    outcomes = ('refused clearly', 'works', 'stops with a word', 'late or unclear', 'wrong or lost', 'endless')
    lines = [['kind', 'tried', *outcomes]]
    for kind in [*sorted({kind for kind, _ in went}), None]:
        counts = [sum(n for (k, o), n in went.items() if kind in (k, None) and o == outcome) for outcome in outcomes]
        lines.append([kind or 'all', str(sum(counts)), *map(str, counts)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    terminalreporter.section('hostile inputs')
    for line in lines:
        terminalreporter.line('  '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
