"""Files of what was tuned alone: made from a checkpoint, put back onto their base, described, compared.

python tools/tuned.py extract [CONFIG] CHECKPOINT OUT.safetensors [--optimizer]
python tools/tuned.py apply [CONFIG] FILE.safetensors OUT.pth
python tools/tuned.py info FILE.safetensors
python tools/tuned.py diff FILE.safetensors FILE.safetensors
"""

import argparse
import io
import sys
from pathlib import Path

from mmdyt import compat

compat.install()

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import mmdyt.models  # noqa: F401  registers
from mmdyt import preflight
from mmdyt.apis.loading import check_local_base
from mmdyt.files import check_out_file, whole_file
from mmdyt.preflight.carried import carried_config
from mmdyt.preflight.checkpoints import AUXILIARY, check_exists, check_fit, read_checkpoint, tensors_in
from mmdyt.tuned.file import SUFFIX, WEIGHTS, write
from mmdyt.tuned.model import complete, tuned_only

DIFFERENT = 1  # exit code of diff
MEGA = 1e6


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    for name, usage, told in (
        ('extract', '[CONFIG] CHECKPOINT OUT', 'write what was tuned of a checkpoint'),
        ('apply', '[CONFIG] FILE OUT', 'write the whole checkpoint: FILE and its base'),
    ):
        command = commands.add_parser(name, help=told, usage=f'%(prog)s {usage} [options]')
        command.add_argument('paths', nargs='+', help='a config (.py) where the checkpoint carries none; two files')
        preflight.add_method_arguments(command)
        command.add_argument('--cfg-options', nargs='+', action=preflight.KeyValues, help='override settings')
        if name == 'extract':
            command.add_argument('--optimizer', action='store_true', help='keep the state of training, to resume')
    command = commands.add_parser('info', help='say what is in a file')
    command.add_argument('file')
    command = commands.add_parser('diff', help='say in what two files differ; exit code 1 if they do')
    command.add_argument('files', nargs=2)
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    args = parser.parse_args()
    if args.command in ('extract', 'apply'):
        args.config = args.paths.pop(0) if args.paths[0].endswith('.py') else None
        if len(args.paths) != 2:
            parser.error(f'{args.command} must get a checkpoint and a file to write, got {args.paths}.')
    return args


def read(path: str, tuned: bool) -> dict:
    """A checkpoint that is tuned-only, or whole."""
    check_exists('checkpoint', path)
    content = read_checkpoint(path)
    if ('tuned' in content) != tuned:
        raise ValueError(f'checkpoint must {"" if tuned else "not "}be a tuned-only file of mmdyt, got {path}.')
    return content


def build(args: argparse.Namespace, content: dict, path: str) -> nn.Module:
    """The model of the config, with the checkpoint in it."""
    if args.config is None:
        for option in ('method', 'method_options', 'cfg_options'):
            if getattr(args, option):
                raise ValueError(f'--{option.replace("_", "-")} must come with a config file, got none.')
        cfg = carried_config(content, path)
        check_local_base(cfg, path)
    else:
        cfg = preflight.load_config(args)
    only = {key: cfg[key] for key in ('model', 'default_scope', 'custom_imports') if cfg.get(key) is not None}
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        preflight.check(Config(dict(only, launcher='none')), loops=())
        model = MODELS.build(cfg.model)
    check_fit(model, tensors_in(content, path), path, exact=True, spare=AUXILIARY)
    return model


def extract(args: argparse.Namespace) -> None:
    """Write the tuned-only file, read it again, and say what was left out."""
    path, out = args.paths[0], Path(args.paths[1])
    if out.suffix != SUFFIX:
        raise ValueError(f'OUT must end in {SUFFIX}, got {out}.')
    check_out_file('OUT', out)
    content = read(path, tuned=False)
    if args.optimizer and 'optimizer' not in content:
        raise ValueError(f'--optimizer must find the state of training, got none in {path}.')
    if args.optimizer and 'ema_state_dict' in content:
        raise ValueError(f'--optimizer must find no averages of all weights (EMAHook), got some in {path}.')
    model = build(args, content, path)
    content['state_dict'] = dict(tensors_in(content, path))
    kept = content if args.optimizer else {key: content[key] for key in WEIGHTS if key in content}
    found = tuned_only(model, kept)
    write(found, out)
    back = complete(model, read(str(out), tuned=True))
    if not all(torch.equal(tensor, back[name]) for name, tensor in content['state_dict'].items()):
        raise RuntimeError(f'{out} does not give back what {path} holds.')
    left, all_of = found['tuned']['base'], content['state_dict']
    print(f'Wrote {out}, {out.stat().st_size / MEGA:.3f} MB instead of {Path(path).stat().st_size / MEGA:.3f}.')
    print(
        f'{len(found["state_dict"])} of {len(all_of)} tensors; the rest is in {", ".join(left["files"]) or "no base"}.'
    )


def apply(args: argparse.Namespace) -> None:
    """Write the whole checkpoint."""
    path, out = args.paths[0], Path(args.paths[1])
    check_out_file('OUT', out)
    if out.suffix == SUFFIX:
        raise ValueError(f'OUT must end in .pth, got {out}.')
    content = read(path, tuned=True)
    model = build(args, content, path)
    whole = {key: value for key, value in content.items() if key != 'tuned'} | dict(state_dict=model.state_dict())
    with io.BytesIO() as stream, whole_file(out, 'wb') as file:  # torch does not say why it could not write a file
        torch.save(whole, stream)
        file.write(stream.getbuffer())
    print(f'Wrote {out}, {out.stat().st_size / MEGA:.3f} MB.')


def info(path: str) -> str:
    """What a file holds, in lines."""
    content = read(path, tuned=True)
    about, meta, tensors = content['tuned'], content.get('meta') or {}, content['state_dict']
    base, seen = about['base'], about['input']
    classes = {key.lower(): value for key, value in (meta.get('dataset_meta') or {}).items()}.get('classes') or []
    rows = dict(
        file=f'{path}, {Path(path).stat().st_size / MEGA:.3f} MB',
        method=', '.join(f'{number} {label}' for label, number in about['method'].items()) or 'no parts',
        base=f'{base["name"]} ({", ".join(base["files"]) or "none"}), {len(base["tensors"])} tensors',
        tuned=f'{sum(t.numel() for t in tensors.values()) / MEGA:.3f} M values in {len(tensors)} tensors',
        classes=f'{len(classes)}: {", ".join(map(str, classes[:5]))}{" ..." * (len(classes) > 5)}',
        input=f'size {seen["size"]}, mean {seen["mean"]}, std {seen["std"]}',
        trained=f'epoch {meta.get("epoch", "unknown")}, iteration {meta.get("iter", "unknown")}',
        resumes='yes' if 'optimizer' in content else 'no',
    )
    return '\n'.join(f'{name:<9}{value}' for name, value in rows.items())


def differences(one: dict, other: dict) -> list[str]:
    """In what two files differ, in lines."""
    lines = []
    for key, told in (('method', 'method'), ('input', 'input')):
        if one['tuned'][key] != other['tuned'][key]:
            lines.append(f'{told}: {one["tuned"][key]}, {other["tuned"][key]}')
    bases = [content['tuned']['base'] for content in (one, other)]
    if bases[0]['tensors'] != bases[1]['tensors']:
        lines.append('base: ' + ', '.join(f'{base["name"]} ({", ".join(base["files"])})' for base in bases))
    classes = [(content.get('meta') or {}).get('dataset_meta') for content in (one, other)]
    lines += ['classes: not the same'] if classes[0] != classes[1] else []
    left, right = one['state_dict'], other['state_dict']
    for name in sorted({*left, *right}):
        if name not in left or name not in right:
            lines.append(f'{name}: only in the {"first" if name in left else "second"}')
        elif left[name].shape != right[name].shape:
            lines.append(f'{name}: shapes {tuple(left[name].shape)}, {tuple(right[name].shape)}')
        elif not torch.equal(left[name], right[name]):
            lines.append(f'{name}: at most {(left[name].double() - right[name].double()).abs().max():.3g} apart')
    return lines


def main() -> None:
    """Do what is asked for."""
    args, lines = parse_args(), []
    with preflight.clean_exit():
        if args.command == 'info':
            print(info(args.file))
        elif args.command == 'diff':
            lines = differences(*(read(path, tuned=True) for path in args.files))
        else:
            dict(extract=extract, apply=apply)[args.command](args)
    if args.command == 'diff':
        print('\n'.join(lines) or 'They are equal.')
        if lines:
            sys.exit(DIFFERENT)


if __name__ == '__main__':
    main()
