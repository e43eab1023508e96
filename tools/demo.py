"""Show Dynamic Tuning (DyT) end to end on a CPU, in a few minutes and without a download.

python tools/demo.py [--work-dir work_dirs/demo] [--seed 0]

Draws small data sets, pre-trains a small Vision Transformer on one task, freezes it, adapts it to two others with
Dynamic Tuning, segmentation and video, tests it, and reports what it learned and what it skipped. Video twice: blind to
the order of frames, and with one option more, seeing it. Every step is a command that you could type yourself.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

from mmdyt import compat

compat.install()

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmseg.apis import inference_model, init_model

from mmdyt.core.grid import active_share
from mmdyt.core.observe import record_dispatch
from mmdyt.core.tuning import count_parameters
from mmdyt.engine.pictures import framed, heat_map, legend, paint_labels, picture_table, stack, write_picture
from mmdyt.packaged import find_config

PRETRAIN, TUNE = 'configs/demo/pretrain_shapes.py', 'configs/demo/dyt_shapes.py'
ORDER_BLIND, TEMPORAL = 'configs/demo/clips_order_blind.py', 'configs/demo/clips_temporal.py'
VALIDATION = 'data/seg/annotations/validation'  # within the demo's folder, as STAMP
STAMP = '.mmdyt_demo'
WIDTH = shutil.get_terminal_size((120, 24)).columns
PROGRESS = ('Epoch(', 'Iter(', 'Parameters (M)')


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'), help='folder to start afresh')
    parser.add_argument('--seed', type=int, default=0, help='of the data and of the training')
    parser.add_argument('--scale', type=float, default=1.0, help='factor on pictures and tuning steps, in (0, 1]')
    return parser.parse_args(argv)


def check_packages() -> None:
    """Refuse to start without what the last stages need."""
    missing = [name for name, module in dict(mmaction2='mmaction', decord='decord').items() if not find_spec(module)]
    if missing:
        raise SystemExit(f'error: the demo must find {" and ".join(missing)}: the extra `video` of mmdyt brings them.')


def start_afresh(work_dir: Path) -> None:
    """Empty the demo's folder; a folder of anything else is refused."""
    if work_dir.exists() and not ((work_dir / STAMP).exists() or (work_dir.is_dir() and not any(work_dir.iterdir()))):
        raise SystemExit(f'error: --work-dir must be new, empty or from an earlier demo, got {work_dir}.')
    shutil.rmtree(work_dir, ignore_errors=True)
    work_dir.mkdir(parents=True)
    (work_dir / STAMP).touch()


def run(title: str, command: list[str], log: Path) -> float:
    """Run one of the tools, show its progress, keep all it says in ``log``; return the seconds that it took."""
    print(f'\n{title}\n$ MMDYT_DEMO={shlex.quote(os.environ["MMDYT_DEMO"])} mmdyt {shlex.join(command)}', flush=True)
    start = time.perf_counter()
    with (
        log.open('w') as file,
        subprocess.Popen(
            [sys.executable, '-m', 'mmdyt', *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        for line in process.stdout:
            file.write(line)
            if any(word in line for word in PROGRESS):
                print('  ' + line.rstrip().rpartition(' - INFO - ')[2][: WIDTH - 2], flush=True)
    if process.returncode:
        raise SystemExit(f'{"".join(log.read_text().splitlines(True)[-15:])}error: this command failed; see {log}.')
    return time.perf_counter() - start


def run_stages(work_dir: Path, seed: int, scale: float) -> dict[str, float]:
    """Draw, pre-train, tune and test; return the seconds of each."""

    def train(config: str) -> list[str]:
        return ['train', config, '--cfg-options', f'randomness.seed={seed}']

    data, tune = ['demo_data', str(work_dir / 'data'), '--seed', str(seed)], train(TUNE)
    if scale != 1:
        data += ['--scale', str(scale)]
        steps = Config.fromfile(find_config(TUNE)).train_cfg.max_iters
        tune.append(f'train_cfg.max_iters={max(1, round(steps * scale))}')
    seconds = dict(
        draw=run('1. Draw the data', data, work_dir / 'draw.log'),
        pretrain=run('2. Pre-train a plain ViT to classify', train(PRETRAIN), work_dir / 'pretrain.log'),
        tune=run('3. Freeze it, and tune it dynamically to segment', tune, work_dir / 'tune.log'),
    )
    test = ['test', TUNE, checkpoint(work_dir)]
    seconds['test'] = run('4. Test', test, work_dir / 'test.log')
    title = '5. Tune the frozen ViT on video, blind to the order of frames'
    seconds['order-blind'] = run(title, train(ORDER_BLIND), work_dir / 'order_blind.log')
    title = '6. The same with one option more, temporal positions'
    seconds['temporal'] = run(title, train(TEMPORAL), work_dir / 'temporal.log')
    return seconds


def checkpoint(work_dir: Path) -> str:
    """The last checkpoint of the tuning."""
    return (work_dir / 'dyt/last_checkpoint').read_text()


def one_class_miou(annotations: Path) -> float:
    """Best mIoU (%) of predicting one and the same class everywhere; 0 in the annotations is ignored."""
    masks = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in annotations.glob('*.png')]
    counts = sum(np.bincount(mask.ravel(), minlength=256) for mask in masks)[1:]
    return 100 * counts.max() / counts.sum() / (counts > 0).sum()


def report_segmentation(work_dir: Path, model) -> str:
    """What was reached: from the metrics that the test left, the validation masks and the model itself."""
    (file,) = work_dir.glob('dyt/*/*.json')
    metrics = json.loads(file.read_text())
    count = {part: number / 1e6 for part, number in count_parameters(model).items()}
    layers = [value for name, value in metrics.items() if name.startswith('activation_rate/')]
    saved = {part: 1 - metrics[part] / metrics[f'{part}_dense'] for part in ('gmacs', 'gmacs_backbone')}
    return f"""
mIoU                 {metrics['mIoU']:.1f} %; one class everywhere: {one_class_miou(work_dir / VALIDATION):.1f} %
Activation rate      {metrics['activation_rate']:.3f}; target {model.target_rate:.3f}
  by layer           {' '.join(f'{rate:.2f}' for rate in layers)}
GMACs per image      {metrics['gmacs']:.4f}; dense {metrics['gmacs_dense']:.4f}: {saved['gmacs']:.0%} saved
  of the backbone    {metrics['gmacs_backbone']:.4f}; dense {metrics['gmacs_backbone_dense']:.4f}: {
        saved['gmacs_backbone']:.0%} saved
Parameters (M)       {count['tuned']:.3f} tuned (adapters {count['adapter']:.3f}, dispatchers {
        count['dispatcher']:.3f}, the rest neck and heads), {count['frozen']:.3f} frozen"""


def report_video(work_dir: Path) -> str:
    """What was reached with and without temporal positions: from the metrics of the last validation."""
    temporal, blind = (clip_metrics(work_dir / name) for name in ('clips_temporal', 'clips_order_blind'))
    cfg = Config.fromfile(find_config(TEMPORAL))
    chance = 100 / len(cfg.classes)
    saved = 1 - temporal['gmacs'] / temporal['gmacs_dense']
    return f"""
Clips, direction     {100 * temporal['acc/top1']:.1f} %; without temporal positions {
        100 * blind['acc/top1']:.1f} %; chance {chance:.0f} %, blind to order at most 50 %
Rate on clips        {temporal['activation_rate']:.3f}; without {blind['activation_rate']:.3f}; target {
        cfg.model.target_rate:.3f}
GMACs per clip       {temporal['gmacs']:.4f}; dense {temporal['gmacs_dense']:.4f}: {saved:.0%} saved"""


def clip_metrics(folder: Path) -> dict[str, float]:
    """Of the validation that ended a training."""
    (file,) = folder.glob('*/vis_data/scalars.json')
    return json.loads(file.read_text().splitlines()[-1])


def report_time(seconds: dict[str, float]) -> str:
    """How long it took, and what was counted."""
    return f"""
Wall time (s)        {', '.join(f'{stage} {value:.0f}' for stage, value in seconds.items())}; {
        sum(seconds.values()):.0f} in all
These are MACs (papers print them as FLOPs)."""


def draw_picture(work_dir: Path, model, count: int = 6) -> Path:
    """Write the first validation images beside ground truth, prediction and active tokens."""
    names, palette = model.dataset_meta['classes'], model.dataset_meta['palette']
    rows = []
    for annotation in sorted((work_dir / VALIDATION).glob('*.png'))[:count]:
        image = cv2.imread(str(work_dir / 'data/seg/images/validation' / annotation.name))
        with record_dispatch(model) as record:
            prediction = inference_model(model, image).pred_sem_seg.data[0].numpy()
        truth = cv2.imread(str(annotation), cv2.IMREAD_UNCHANGED) - np.uint8(1)  # 0, ignored, becomes 255
        share = active_share(record.flat(), model.backbone.patch_resolution)[0].numpy()
        rows.append([image, paint_labels(truth, palette), paint_labels(prediction, palette), heat_map(share)])
    table = picture_table(['image', 'ground truth', 'prediction', 'active tokens'], rows)
    classes = legend(names, paint_labels(np.arange(len(names)), palette), table.shape[1])
    steps = np.linspace(0, 1, 5)
    scale = legend([f'in {step:.0%} of layers' for step in steps], heat_map(steps[None])[0], table.shape[1])
    path = work_dir / 'demo.png'
    write_picture(path, framed(stack([table, classes, scale])))
    return path


def main(argv: list[str] | None = None) -> None:
    """Run the demo as its commands are printed: in the working directory."""
    args = parse_args(argv)
    check_packages()
    work_dir = args.work_dir
    start_afresh(work_dir)
    os.environ['MMDYT_DEMO'] = str(work_dir)
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # tensors as small as these gain little from more threads
    MMLogger.get_current_instance().setLevel('WARNING')  # this process reports, the stages log
    warnings.simplefilter('ignore')
    seconds = run_stages(work_dir, args.seed, args.scale)
    model = init_model(str(find_config(TUNE)), checkpoint(work_dir), device='cpu')
    print(report_segmentation(work_dir, model), report_video(work_dir), report_time(seconds), sep='')
    print(f'Picture              {draw_picture(work_dir, model)}')


if __name__ == '__main__':
    main()
