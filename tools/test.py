"""Test a checkpoint of any mmdyt config: classification, segmentation or video.

python tools/test.py configs/dyt/upernet_vitb_ade20k.py work_dirs/upernet_vitb_ade20k/iter_160000.pth [--tta]
"""

import argparse
from contextlib import nullcontext

from mmdyt import compat

compat.install()

from mmengine.runner import Runner

from mmdyt import preflight
from mmdyt.core.fit.request import RULES, CalibrationRequest
from mmdyt.core.observe import complete_model, dynamic_branches
from mmdyt.engine.calibration import calibrate_host, sentence, unwrapped
from mmdyt.engine.finite import watched


def parse_args() -> argparse.Namespace:
    """Read the command line; the options are those of the OpenMMLab tools."""
    parser = argparse.ArgumentParser(description='Test a checkpoint.')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--work-dir', help='folder for the log and the metrics; default work_dirs/<config name>')
    parser.add_argument('--tta', action='store_true', help="use the config's test-time augmentation")
    parser.add_argument('--complete', action='store_true', help='test the complete model: every token runs everything')
    parser.add_argument('--target-rate', type=float, help='calibrate to this activation rate first; not stored')
    parser.add_argument('--target-gmacs', type=float, help='calibrate to this cost first; not stored')
    parser.add_argument('--rule', help=f'of the calibration: {", ".join(RULES)}')
    parser.add_argument('--batches', type=int, help='of training images for the calibration; default: 8')
    parser.add_argument('--per-image', action='store_true', help='of the calibration: the same rate for every image')
    parser.add_argument('--random-masks', action='store_true', help='repeat with random masks, at the same rates')
    parser.add_argument('--consistency', action='store_true', help='also of each image flipped; see docs/dispatch.md')
    parser.add_argument('--dump', metavar='FILE', help='pickle all predictions, as DumpResults of mmengine does')
    parser.add_argument('--show-dir', help='folder for painted predictions')
    preflight.add_method_arguments(parser)
    preflight.add_dry_run_argument(parser)
    parser.add_argument('--cfg-options', nargs='+', action=preflight.KeyValues, help='override settings, key=value')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def calibrate(runner: Runner, request: CalibrationRequest) -> None:
    """Set the thresholds for this test."""
    runner.load_or_resume()
    train = runner.build_dataloader(runner.cfg.train_dataloader)
    found = calibrate_host(unwrapped(runner.model), train, runner.test_loop.dataloader, request)
    runner.logger.info(f'Calibrated thresholds ({request.rule}): {sentence(found, request.target_rate)}')


def main() -> None:
    """Check everything the user typed, then test."""
    args = parse_args()
    with preflight.clean_exit():
        cfg = preflight.load_config(args)
        cfg.load_from = args.checkpoint
        if args.show_dir:
            preflight.paint_predictions(cfg, args.show_dir)
        if args.random_masks:
            if args.complete:
                raise ValueError('--random-masks must not be combined with --complete, which has no masks, got both.')
            cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='mmdyt.RandomMasksHook')]
        if args.consistency:
            cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='mmdyt.ConsistencyHook', flip=True)]
        if args.dump:
            preflight.dump_predictions(cfg, args.dump)
        if args.tta:
            preflight.use_tta(cfg)
        preflight.check(cfg, loops=('test',), dry_run=args.dry_run)
        calibrates = args.target_rate is not None or args.target_gmacs is not None
        for option, value in (('per-image', args.per_image), ('batches', args.batches), ('rule', args.rule)):
            if value not in (None, False) and not calibrates:
                raise ValueError(f'--{option} must come with --target-rate or --target-gmacs, got neither.')
        rule, batches = args.rule or RULES[0], 8 if args.batches is None else args.batches
        request = CalibrationRequest(args.target_rate, rule, args.per_image, batches, args.target_gmacs)
        if preflight.is_flexible(cfg) and (calibrates or args.complete or args.random_masks):
            raise ValueError(
                f'runner_type must be Runner with --complete, --random-masks, --target-rate and --target-gmacs, got '
                f'{cfg.runner_type}, whose model is not there before the test.'
            )
        if calibrates:
            if any(hook['type'] == 'EMAHook' for hook in cfg.get('custom_hooks', [])):
                raise ValueError('custom_hooks must hold no EMAHook for --target-rate and --target-gmacs, got one.')
            if args.tta or args.complete:
                raise ValueError('--target-rate and --target-gmacs must not be combined with --tta or --complete.')
            preflight.check_images(cfg, ['train_dataloader'])
    runner = preflight.build_runner(cfg)
    with preflight.clean_exit():
        for option in ('complete', 'random_masks', 'consistency'):
            if getattr(args, option) and not dynamic_branches(runner.model):
                raise ValueError(f'--{option.replace("_", "-")} must find dispatchers in the model, got none.')
        if calibrates:
            calibrate(runner, request)
    with watched(runner), complete_model(runner.model) if args.complete else nullcontext():
        runner.test()
    preflight.end_cpu_processes()


if __name__ == '__main__':
    main()
