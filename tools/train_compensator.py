"""Train the bridge between degrees of token merging (ToCom), once for a pre-trained network, on images without labels.

python tools/train_compensator.py configs/tocom/vitti_cifar100_1k.py --out pretrain/vit_tiny_bridge.pth
    [--work-dir DIR] [--resume [CHECKPOINT]] [--amp]
"""

import argparse
import io
from pathlib import Path

from mmdyt import compat

compat.install()

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.dist import is_main_process

from mmdyt import preflight
from mmdyt.engine.calibration import unwrapped
from mmdyt.engine.finite import watched
from mmdyt.files import check_out_file, whole_file
from mmdyt.parts.bridge import bridge_state

TRAINER = 'mmdyt.CompensatorTrainer'


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Train the bridge between degrees of token merging on the training images; labels are not read.'
    )
    parser.add_argument('config', help=f'config file, with a model of type {TRAINER}')
    parser.add_argument('--out', type=Path, required=True, help='file to write: the bridge only')
    preflight.add_training_arguments(parser)
    preflight.add_dry_run_argument(parser)
    parser.add_argument('--cfg-options', nargs='+', action=preflight.KeyValues, help='override settings, key=value')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(cfg: Config) -> None:
    """Refuse a config whose class scores teach nothing; leave out validation, which has other classes.

    Raises:
        ValueError: If the model is no such trainer, or its head is not loaded.
    """
    model = cfg.get('model') or {}
    if model.get('type') != TRAINER:
        raise ValueError(f'model.type must be {TRAINER}, got {model.get("type")!r}.')
    for name in ('backbone', 'head'):
        loaded = (model.get(name) or {}).get('init_cfg') or {}
        if not (isinstance(loaded, dict) and loaded.get('type') == 'Pretrained'):
            raise ValueError(
                f"model.{name}.init_cfg must be of type 'Pretrained', got {loaded or None}. The pre-trained network's "
                'own class scores are what the bridge learns from.'
            )
    for loop in ('val', 'test'):
        for part in ('dataloader', 'cfg', 'evaluator'):
            cfg[f'{loop}_{part}'] = None


def write(model: nn.Module, out: Path) -> None:
    """The bridge alone."""
    with io.BytesIO() as whole, whole_file(out, 'wb') as stream:  # torch does not say why it could not write a file
        torch.save(bridge_state(model), whole)
        stream.write(whole.getbuffer())


def main() -> None:
    """Check everything the user typed, then train and write."""
    args = parse_args()
    with preflight.clean_exit():
        check_out_file('--out', args.out)
        cfg = preflight.load_config(args)
        prepare(cfg)
        if args.amp:
            preflight.use_amp(cfg)
        preflight.set_resume(cfg, args.resume)
        preflight.check(cfg, loops=('train',), dry_run=args.dry_run)
        held = preflight.hold_work_dir(cfg)
    with held:
        runner = preflight.build_runner(cfg)
        with watched(runner):
            runner.train()
        if is_main_process():
            write(unwrapped(runner.model), args.out)
            print(f'Wrote {args.out}.')
    preflight.end_cpu_processes()


if __name__ == '__main__':
    main()
