"""Export a calibrated model as one file that runs without this package, and check that it is the same model.

python tools/export.py configs/dyt/vitti_cifar100_1k.py calibrated.pth model.onnx [--shape H W] [--int8]
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from mmdyt import compat

compat.install()

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner

from mmdyt import preflight
from mmdyt.core.fit.request import RULES, CalibrationRequest
from mmdyt.engine import onnx_files
from mmdyt.engine.benchmark.variants import DENSE, like
from mmdyt.engine.calibration import calibrate_host, sentence
from mmdyt.engine.export import (
    Deployed,
    Facts,
    capacities,
    deploy,
    facts_of,
    read_program,
    task_of,
    to_program,
    write_program,
)
from mmdyt.engine.export_check import TOLERANCE, Comparison, Run, TestImages, accuracies, compare, median_times
from mmdyt.files import check_out_file, whole_path, write_json
from mmdyt.preflight.checkpoints import AUXILIARY, check_exists, check_fit, read_tensors

LOADERS = ('train_dataloader', 'val_dataloader')  # of a calibration
SUFFIXES = ('.onnx', '.pt2')


class UnequalError(Exception):
    """The exported file computes something else than the model."""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Export a classifier or segmentor whose dispatchers have capacities (tools/calibrate.py '
        '--per-image), compare the file with the model on test images, and time both.'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('out', type=Path, help='file to write, .onnx or .pt2')
    parser.add_argument('--shape', type=int, nargs=2, metavar=('H', 'W'), help='of images; default: of a test image')
    parser.add_argument('--opset', type=int, default=20, help="of ONNX's operators; default: 20")
    parser.add_argument('--int8', action='store_true', help='also write OUT.int8.onnx, and test both')
    parser.add_argument('--images', type=int, default=100, help='test images to compare on; default: 100')
    parser.add_argument('--batch', type=int, default=1, help='images at once when timed; default: 1')
    parser.add_argument('--rounds', type=int, default=20, help='timed passes, 0 for none; default: 20')
    parser.add_argument('--threads', type=int, default=1, help='of torch and onnxruntime; default: 1')
    parser.add_argument('--target-rate', type=float, help='calibrate to this activation rate first; not stored')
    parser.add_argument('--rule', help=f'of the calibration: {", ".join(RULES)}')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all that is printed')
    preflight.add_method_arguments(parser)
    parser.add_argument('--cfg-options', nargs='+', action=preflight.KeyValues, help='override settings, key=value')
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    return parser.parse_args()


def check_typed(args: argparse.Namespace) -> None:
    """Refuse what the user typed where it cannot work, before anything is read."""
    if args.out.suffix not in SUFFIXES:
        raise ValueError(f'out must end with one of {list(SUFFIXES)}, got {args.out}.')
    check_out_file('out', args.out)
    if args.out.suffix == '.onnx':
        onnx_files.check_libraries()
    if args.opset not in onnx_files.OPSETS:
        first, last = onnx_files.OPSETS[0], onnx_files.OPSETS[-1]
        raise ValueError(f'--opset must lie between {first} and {last}, got {args.opset}.')
    if args.int8:
        if args.out.suffix != '.onnx':
            raise ValueError(f'--int8 must come with an .onnx file, got {args.out}.')
        check_out_file('out', int8_of(args.out))
    if args.json:
        check_out_file('--json', args.json)
    for name, least in dict(images=1, batch=1, rounds=0, threads=1).items():
        if getattr(args, name) < least:
            raise ValueError(f'--{name} must be at least {least}, got {getattr(args, name)}.')
    if args.shape and min(args.shape) < 1:
        raise ValueError(f'--shape must hold two positive sizes in pixels, got {args.shape}.')
    if args.rule and args.target_rate is None:
        raise ValueError(f'--rule must come with --target-rate, got {args.rule} alone.')


def int8_of(out: Path) -> Path:
    """Where the quantised file goes."""
    return out.with_suffix('.int8.onnx')


def load(args: argparse.Namespace) -> tuple[Config, nn.Module]:
    """The config, and its model with the checkpoint's weights, calibrated where that is wanted."""
    cfg = preflight.load_config(args)
    check_exists('checkpoint', args.checkpoint)
    cfg.load_from = None  # a config may go on from another
    preflight.check(cfg, loops=())
    preflight.check_images(cfg, ['test_dataloader'])
    if args.int8 and (cfg.model.get('test_cfg') or {}).get('mode') == 'slide':
        raise ValueError("test_cfg.mode must be 'whole' for --int8 to be tested, got 'slide'.")
    model = MODELS.build(cfg.model).eval()
    task_of(model)
    check_fit(model, read_tensors(args.checkpoint), args.checkpoint, exact=True, spare=AUXILIARY)  # loads it too
    if args.target_rate is not None:
        request = CalibrationRequest(args.target_rate, args.rule or RULES[0], per_image=True)
        preflight.check_images(cfg, LOADERS)
        loaders = [cfg.get(name) and Runner.build_dataloader(cfg[name]) for name in LOADERS]
        print(f'Calibrated: {sentence(calibrate_host(model, *loaders, request), args.target_rate)}')
    capacities(model)
    return cfg, model


def write(program, facts: Facts, path: Path, args: argparse.Namespace) -> Run:
    """Write the file; returns what it computes when it is read again."""
    if args.out.suffix == '.onnx':
        onnx_files.write_onnx(program, facts, path, args.opset)
        return onnx_files.open_onnx(path, args.threads)
    write_program(program, facts, path)
    return read_program(path)[0]


def check_equal(comparison: Comparison, names: list[str]) -> None:
    """Refuse a file that computes something else.

    Raises:
        UnequalError: Naming the images.
    """
    if unequal := comparison.unequal():
        worst = ', '.join(f'{names[i]} ({comparison.differences[i]:.1e})' for i in unequal[:5])
        raise UnequalError(
            f'{len(unequal)} of {len(names)} images have scores that differ by more than {TOLERANCE:g} of their scale: '
            f'{worst}{" ..." * (len(unequal) > 5)}. Nothing was written.'
        )


def export(args: argparse.Namespace, cfg: Config, host: nn.Module) -> dict:
    """Export, compare, time and test; returns what there is to report."""
    images = TestImages(cfg, host, args.images, args.shape)
    model, unmerged = deploy(host)
    facts = facts_of(model, unmerged, cfg, images.size, images.classes)
    eager = Deployed(host).eval()
    program = to_program(model, images.size)
    with whole_path(args.out) as part:
        run = write(program, facts, part, args)
        comparison = compare(eager, run, images)
        check_equal(comparison, images.names())
    report = dict(file=str(args.out), megabytes=args.out.stat().st_size / 1e6, facts=asdict(facts))
    report |= dict(opset=args.opset) if args.out.suffix == '.onnx' else {}
    report['check'] = dict(
        images=len(images),
        resized=images.resized,
        predictions=comparison.total,
        equal=comparison.equal,
        largest_difference=comparison.largest(),
        decided_by_rounding=len(comparison.flipped()),
    )
    kind = 'onnxruntime' if args.out.suffix == '.onnx' else 'pt2'
    runs, tested = {'eager': model, kind: run}, {'eager': eager, kind: run}
    if args.int8:
        with whole_path(int8_of(args.out)) as part:
            onnx_files.quantize(args.out, part)
        tested['onnxruntime int8'] = onnx_files.open_onnx(int8_of(args.out), args.threads)
        runs['onnxruntime int8'] = tested['onnxruntime int8']
        report['int8_megabytes'] = int8_of(args.out).stat().st_size / 1e6
        report['accuracy'] = accuracies(host, tested, images, cfg)
    if args.rounds:
        runs |= dense_runs(cfg, model, facts, args)
        batch, _ = next(images.batches((args.batch,)))
        times = median_times(runs, batch, args.rounds)
        setting = dict(batch=len(batch), threads=args.threads, rounds=args.rounds, torch=torch.__version__)
        report['latency'] = dict(setting, milliseconds=times)
    return report


def dense_runs(cfg: Config, model: Deployed, facts: Facts, args: argparse.Namespace) -> dict[str, Run]:
    """The frozen network without parts, in eager mode and as a file of the same kind."""
    host = MODELS.build(dict(cfg.model, backbone=dict(cfg.model.backbone, **DENSE)))
    dense, _ = deploy(like(model.host, host))
    file = args.out.with_name(f'.{args.out.stem}_dense{args.out.suffix}')
    try:
        run = write(to_program(dense, facts.size), facts, file, args)
    finally:
        file.unlink(missing_ok=True)
    return {'eager dense': dense, f'{"onnxruntime" if args.out.suffix == ".onnx" else "pt2"} dense': run}


def describe(report: dict) -> str:
    """What there is to say, for people."""
    facts, check = report['facts'], report['check']
    size = ' x '.join(map(str, facts['size']))
    opset = f', opset {report["opset"]}' if 'opset' in report else ''
    merged = f' Not merged: {", ".join(facts["unmerged"])}.' if facts['unmerged'] else ''
    lines = [f'Wrote {report["file"]}: {facts["task"]} of {size}{opset}, {report["megabytes"]:.1f} MB.{merged}']
    what = 'pixels' if facts['task'] == 'segmentation' else 'images'
    lines.append(
        f'Beside the model on {check["images"]} test images: {check["equal"]} of {check["predictions"]} {what} '
        f'predicted alike; largest difference {check["largest_difference"]:.1e} of the scores.'
    )
    if check['resized']:
        lines.append(f'{check["resized"]} images were resized to fit.')
    if check['decided_by_rounding']:
        lines.append(
            f'{check["decided_by_rounding"]} more: rounding decided a tie of token scores, and another token ran.'
        )
    if latency := report.get('latency'):
        lines += [
            '',
            f'Median of {latency["rounds"]} passes, batch {latency["batch"]}, {latency["threads"]} thread(s), ms:',
        ]
        lines += [f'  {name:<20}{ms:9.1f}' for name, ms in latency['milliseconds'].items()]
    for name, metrics in report.get('accuracy', {}).items():
        found = ', '.join(f'{metric} {value:.2f}' for metric, value in metrics.items())
        lines.append(f'{name}, {check["images"]} images: {found}')
    return '\n'.join(lines)


def main() -> None:
    """Check what the user typed, export, and print."""
    args = parse_args()
    with preflight.clean_exit():
        check_typed(args)
        torch.set_num_threads(args.threads)
        cfg, host = load(args)
        try:
            report = export(args, cfg, host)
        except UnequalError as error:
            raise SystemExit(f'error: {error}') from error
    print(describe(report))
    if args.json:
        with preflight.clean_exit():
            write_json(args.json, report)


if __name__ == '__main__':
    main()
