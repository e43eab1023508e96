"""Fold what merges (LoRA, SSF, ETHER) into the frozen weights, keep the rest, and check that outputs stay equal.

python tools/merge.py [CONFIG] CHECKPOINT OUT.pth [--images IMAGE|VIDEO|FOLDER ...] [--strip]

OUT.py beside OUT.pth is the config of the merged model. With --strip OUT.pth is a checkpoint of stock mmpretrain.
"""

import argparse
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

from mmdyt import compat

compat.install()

from mmengine.config import Config

from mmdyt import preflight
from mmdyt.apis import Predictor, load
from mmdyt.apis.merging import (
    TOLERANCE,
    Merged,
    Watched,
    check_plain,
    compare,
    merge_model,
    parameters_of_parts,
    plain_backbone,
    random_inputs,
    save,
)
from mmdyt.files import check_out_file, whole_path
from mmdyt.preflight.carried import config_text, read_values
from mmdyt.preflight.checkpoints import check_exists, read_checkpoint

RANDOM = 4  # inputs, where none is named


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('paths', nargs='+', help='a config (.py) where the checkpoint carries none; checkpoint; OUT')
    parser.add_argument('--images', nargs='+', help='inputs to check outputs on; default: 4 of noise')
    parser.add_argument('--strip', action='store_true', help="leave a checkpoint of mmpretrain's VisionTransformer")
    preflight.add_method_arguments(parser)
    parser.add_argument('--cfg-options', nargs='+', action=preflight.KeyValues, help='override settings, key=value')
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    args = parser.parse_args()
    args.config = args.paths.pop(0) if args.paths[0].endswith('.py') else None
    if len(args.paths) != 2:
        parser.error(f'a checkpoint and a file to write must be named, got {args.paths}.')
    args.checkpoint, args.out = args.paths[0], Path(args.paths[1])
    return args


def whole_config(args: argparse.Namespace, content: dict) -> Config:
    """All of the config: the file's, or the one that the checkpoint carries, as values."""
    if args.config is not None:
        return preflight.load_config(args)
    for option in ('method', 'method_options', 'cfg_options'):
        if getattr(args, option):
            raise ValueError(f'--{option.replace("_", "-")} must come with a config file, got none.')
    return Config(read_values(config_text(content, args.checkpoint), args.checkpoint))


def inputs_of(args: argparse.Namespace, model: Predictor) -> list:
    """What the user named, or noise."""
    if args.images:
        return [source for images in args.images for source in model.sources(images)]
    size = model.host.backbone.img_size
    return random_inputs(model, RANDOM, (size, size) if isinstance(size, int) else tuple(size))


def check_equal(before: Watched, after: Watched) -> str:
    """Refuse a merged model that is another; else say how equal it is."""
    worst, flipped = compare(before, after)
    total = len(before.predictions)
    if worst > TOLERANCE or len(flipped) * 2 > total:
        raise RuntimeError(f'the merged model differs: by {worst:.1e}, and in its tokens on {len(flipped)} of {total}.')
    ties = f' On {len(flipped)} more rounding decided otherwise which token runs.' if flipped else ''
    return f'Features are equal to {worst:.1e} of the largest on {total - len(flipped)} inputs.{ties}'


def report(found: Merged, before: Watched, after: Watched, model: Predictor) -> str:
    """What was folded, what is left, and what it costs."""

    def said(kinds: dict[str, int]) -> str:
        return ', '.join(f'{number} {label}' for label, number in kinds.items()) or 'nothing'

    costs = [sum(p.gmacs for p in watched.predictions) / len(watched.predictions) for watched in (before, after)]
    dense = sum(p.gmacs_dense for p in after.predictions) / len(after.predictions)
    lines = [f'Folded: {said(found.folded)}.']
    lines += [f'Left: {said(found.left)}, {parameters_of_parts(model.host) / 1e6:.3f} M parameters.']
    lines += [f'GMACs of an input: {costs[0]:.4f} before, {costs[1]:.4f} now, {dense:.4f} of the plain ViT.']
    return '\n'.join(lines)


def main() -> None:
    """Check what the user typed, merge, check, and write."""
    args = parse_args()
    with preflight.clean_exit():
        check_out_file('OUT', args.out)
        if args.out.suffix != '.pth':
            raise ValueError(f'OUT must end in .pth, got {args.out}.')
        check_exists('checkpoint', args.checkpoint)
        if args.out.exists() and args.out.samefile(args.checkpoint):
            raise ValueError(f'OUT must name another file than the checkpoint, got {args.out} for both.')
        content = read_checkpoint(args.checkpoint)
        cfg = whole_config(args, content)
        with redirect_stdout(sys.stderr):  # logs of the hosts
            model = load(args.checkpoint, None if args.config is None else cfg)
        inputs = inputs_of(args, model)
        before = Watched(model, inputs)
        found = merge_model(model.host, cfg)
        plain = plain_backbone(model.host, found.config.model.backbone) if args.strip else None
        meta = (content.get('meta') or {}) | dict(cfg=found.config.pretty_text)
    with preflight.clean_exit(), whole_path(args.out) as part:
        save(model.host, meta, part)
        again = load(part, None if args.config is None else found.config)
        after = Watched(again, inputs)
        equal = check_equal(before, after)
        if plain is not None:
            worst = check_plain(again.host, plain, before.images)
            if worst > TOLERANCE:
                raise RuntimeError(f"mmpretrain's VisionTransformer differs by {worst:.1e}.")
            equal += f" mmpretrain's VisionTransformer: to {worst:.1e}."
            save(model.host, {key: meta[key] for key in ('dataset_meta', 'epoch', 'iter') if key in meta}, part)
    print(report(found, before, after, again))
    print(equal)
    print(f'Wrote {args.out}, {os.path.getsize(args.out) / 1e6:.3f} MB.')
    if plain is None:
        found.config.dump(str(args.out.with_suffix('.py')))
        print(f'Its config: {args.out.with_suffix(".py")}.')
    else:
        init_cfg = dict(type='Pretrained', checkpoint=str(args.out), prefix='backbone.')
        print(f'backbone={dict(plain, init_cfg=init_cfg)}')


if __name__ == '__main__':
    main()
