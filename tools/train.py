"""Train any mmdyt config: classification, segmentation or video.

python tools/train.py configs/dyt/upernet_vitb_ade20k.py [--work-dir DIR] [--resume [CHECKPOINT]] [--amp]
"""

import argparse

from mmdyt import compat

compat.install()


from mmdyt import preflight  # noqa: E402
from mmdyt.engine.finite import watched  # noqa: E402


def parse_args() -> argparse.Namespace:
    """Read the command line; the options are those of the OpenMMLab tools."""
    parser = argparse.ArgumentParser(description='Train a model.')
    parser.add_argument('config', help='config file')
    preflight.add_training_arguments(parser)
    preflight.add_method_arguments(parser)
    preflight.add_dry_run_argument(parser)
    parser.add_argument('--cfg-options', nargs='+', action=preflight.KeyValues, help='override settings, key=value')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Check everything the user typed, then train."""
    args = parse_args()
    with preflight.clean_exit():
        cfg = preflight.load_config(args)
        if args.amp:
            preflight.use_amp(cfg)
        preflight.set_resume(cfg, args.resume)
        preflight.check(cfg, loops=('train', 'val'), dry_run=args.dry_run)
        held = preflight.hold_work_dir(cfg)
    with held:
        runner = preflight.build_runner(cfg)
        with watched(runner):
            runner.train()
    preflight.end_cpu_processes()


if __name__ == '__main__':
    main()
