"""Predict images or videos with a trained model: best classes, segmentations, active tokens, and what each cost.

python tools/predict.py [CONFIG] CHECKPOINT IMAGE|VIDEO|FOLDER|LIST ... [--out DIR] [--rate R | --gmacs G]
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

from mmdyt import compat

compat.install()

import torch
from mmengine.utils import ProgressBar

from mmdyt import preflight
from mmdyt.apis import Prediction, Predictor, Skipped, load
from mmdyt.apis.drawing import LINES, ResultFolder
from mmdyt.files import hold
from mmdyt.preflight.refusals import warn
from mmdyt.preflight.work_dir import check_folder

SKIPPED, STOPPED = 1, 130  # exit codes: an input was skipped; Ctrl-C, as shells have it


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Predict images or videos. See docs/predict.md.',
        usage='%(prog)s [CONFIG] CHECKPOINT IMAGE|VIDEO|FOLDER|LIST ... [options]',
    )
    parser.add_argument('paths', nargs='+', help='a config (.py) where the checkpoint carries none; the checkpoint; '
                        'images or videos, folders of them, lists (.txt) of them')  # fmt: skip
    parser.add_argument('--out', help=f'folder for {LINES} and pictures')
    parser.add_argument('--no-pictures', dest='pictures', action='store_false', help='write no pictures into --out')
    parser.add_argument('--json', action='store_true', help='print lines of JSON')
    share = parser.add_mutually_exclusive_group()
    share.add_argument('--rate', type=float, help='share of the patch tokens to run, of every input, in (0, 1]')
    share.add_argument('--gmacs', type=float, help='what every input may cost, neck and head included')
    parser.add_argument('--top', type=int, default=5, help='classes of each input; default: 5')
    parser.add_argument('--batch-size', type=int, default=8, help='inputs of one size that run at once; default: 8')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    preflight.add_method_arguments(parser)
    parser.add_argument('--cfg-options', nargs='+', action=preflight.KeyValues, help='override settings, key=value')
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    args = parser.parse_args()
    args.config = args.paths.pop(0) if args.paths[0].endswith('.py') else None
    if len(args.paths) < 2:
        parser.error(f'a checkpoint and at least one input must be named, got {args.paths}.')
    args.checkpoint, *args.inputs = args.paths
    return args


def load_model(args: argparse.Namespace) -> Predictor:
    """The model, on its device, at the rate or cost that is wanted."""
    if args.out is not None:
        check_folder('--out', args.out)
    if args.config is None:
        for option in ('method', 'method_options', 'cfg_options'):
            if getattr(args, option):
                raise ValueError(f'--{option.replace("_", "-")} must come with a config file, got none.')
    model = load(args.checkpoint, None if args.config is None else preflight.load_config(args), args.device)
    if args.rate is not None:
        model.set_rate(args.rate)
    if args.gmacs is not None:
        model.set_gmacs(args.gmacs)
    if (args.rate, args.gmacs) != (None, None) and model.equal_shares:
        warn(
            'the checkpoint does not say how layers share a rate, so all get the same: tools/calibrate.py --per-image '
            'makes one that does.'
        )
    return model


def watched(found: Iterable, number: int, wanted: bool) -> Iterator:
    """With a progress bar on the error stream, where it is wanted."""
    bar = ProgressBar(number, file=sys.stderr) if wanted else None
    for one in found:
        yield one
        if bar:
            bar.update()


def show(one: Prediction | Skipped, args: argparse.Namespace) -> None:
    """One line for people or for programs; what is skipped is always said."""
    if isinstance(one, Skipped):
        print(f'\nwarning: {one}', file=sys.stderr, flush=True)
    if args.json or (args.out is None and isinstance(one, Prediction)):
        print(json.dumps(one.line(), allow_nan=False) if args.json else one, flush=True)


def main() -> None:
    """Check everything the user typed, then predict."""
    args = parse_args()
    done = skipped = 0
    with preflight.clean_exit(), ExitStack() as stack:
        with redirect_stdout(sys.stderr):  # logs of the hosts; the output is for predictions
            model = load_model(args)
        sources = model.sources(args.inputs)
        draws = args.out is not None and args.pictures
        found = model.each(sources, args.batch_size, args.top, pictures=draws)
        out = None
        if args.out is not None:
            stack.enter_context(hold(Path(args.out)))
            out = stack.enter_context(ResultFolder(args.out, model.palette, draws))
        try:
            for one in watched(found, len(sources), args.out is not None or not sys.stdout.isatty()):
                if out:
                    out.add(one)
                show(one, args)
                done, skipped = done + 1, skipped + isinstance(one, Skipped)
        except KeyboardInterrupt:
            kept = f'; they are in {out.file}' if out else ''
            print(f'\nstopped: {done} of {len(sources)} inputs are done{kept}.', file=sys.stderr)
            sys.exit(STOPPED)
    if out:
        print(f'\nPredictions: {out.file}, {done - skipped} of {len(sources)} inputs.')
    if skipped:
        print(f'warning: {skipped} of {len(sources)} inputs were skipped.', file=sys.stderr)
        sys.exit(SKIPPED)


if __name__ == '__main__':
    main()
