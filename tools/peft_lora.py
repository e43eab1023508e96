"""LoRA files of Hugging Face PEFT (adapter_model.safetensors, adapter_config.json) in and out.

python tools/peft_lora.py import CONFIG FOLDER OUT.safetensors
python tools/peft_lora.py export [CONFIG] CHECKPOINT FOLDER [--base NAME]
"""

import argparse
from pathlib import Path

from mmdyt import compat

compat.install()

import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import mmdyt.models  # noqa: F401  registers
from mmdyt import preflight
from mmdyt.apis import load
from mmdyt.core.part import parts
from mmdyt.files import check_out_file
from mmdyt.parts.lora import LoRA
from mmdyt.preflight.checkpoints import check_fit
from mmdyt.preflight.refusals import warn
from mmdyt.preflight.work_dir import check_folder
from mmdyt.tuned.file import SUFFIX, write
from mmdyt.tuned.model import base_tensors, kept_names, methods, tuned_only
from mmdyt.tuned.peft import PeftAdapter, Update, part_configs, read_peft, to_state, write_peft

HEAD = 'head.layers.head.'  # mmpretrain's linear classifier


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    command = commands.add_parser('import', help='make a tuned-only file of a folder of PEFT')
    command.add_argument('config', help='of the base, the head and the data; its method is replaced')
    command.add_argument('folder')
    command.add_argument('out', type=Path)
    command.add_argument('--cfg-options', nargs='+', action=preflight.KeyValues, help='override settings')
    command = commands.add_parser('export', help='make a folder for PEFT of a checkpoint')
    command.add_argument(
        'paths', nargs='+', help='a config (.py) where the checkpoint carries none; checkpoint; folder'
    )
    command.add_argument('--base', default='', help='name of the base model, for PEFT')
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0, method=None, method_options=None)
    args = parser.parse_args()
    if args.command == 'export':
        args.config = args.paths.pop(0) if args.paths[0].endswith('.py') else None
        if len(args.paths) != 2:
            parser.error(f'a checkpoint and a folder must be named, got {args.paths}.')
    return args


def with_lora(cfg: Config, adapter: PeftAdapter) -> nn.Module:
    """The config's model with the adapter's parts in the place of its method; changes the config."""
    cfg.model.backbone.update(adapter=None, dispatcher=None, substitute=None, parts=part_configs(adapter))
    cfg.model.backbone.pop('tuned', None)
    only = {key: cfg[key] for key in ('model', 'default_scope', 'custom_imports') if cfg.get(key) is not None}
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        preflight.check(Config(dict(only, launcher='none')), loops=())
        return MODELS.build(cfg.model)


def bring_in(args: argparse.Namespace) -> None:
    """Write the tuned-only file of a folder."""
    if args.out.suffix != SUFFIX:
        raise ValueError(f'OUT must end in {SUFFIX}, got {args.out}.')
    check_out_file('OUT', args.out)
    adapter, cfg = read_peft(args.folder), preflight.load_config(args)
    model = with_lora(cfg, adapter)
    head = {f'{HEAD}{name}': tensor.float() for name, tensor in adapter.head.items()}
    state = {name: t.clone() for name, t in model.state_dict().items() if not name.startswith('backbone.')}
    if not head:
        warn(f'{args.folder} has no classifier, so that of {args.out} is as good as any: train it.')
    tensors = dict(base_tensors(model)) | state | head | to_state(adapter)
    tensors = {name: tensor for name, tensor in tensors.items() if name in model.state_dict()}
    check_fit(model, tensors, args.folder, exact=True)
    found = tuned_only(model, dict(state_dict=model.state_dict(), meta=dict(cfg=cfg.pretty_text)))
    write(found, args.out)
    print(f'Wrote {args.out}: {len(adapter.updates)} updates{", a classifier" * bool(head)}.')


def take_out(args: argparse.Namespace) -> None:
    """Write the folder of a checkpoint."""
    checkpoint, folder = args.paths
    check_folder('FOLDER', folder)
    model = load(checkpoint, args.config).host
    if any(not isinstance(part, LoRA) for part in parts(model)) or not methods(model):
        raise ValueError(f'model must have parts of LoRA and no others, got {methods(model) or "none"}.')
    updates = {}
    for name, part in model.named_modules():
        if isinstance(part, LoRA):
            _, _, layer, _, place, _, short = name.split('.')
            updates[int(layer), f'{place}.{short}'] = Update(part.down, part.up, part.scale)
    state = model.state_dict()
    head = {name.removeprefix(HEAD): state[name] for name in state if name.startswith(HEAD)}
    rest = [name for name in kept_names(model) if '.lora.' not in name and not name.startswith(HEAD)]
    if rest:
        raise ValueError(f'model must be tuned by LoRA and a linear head alone, got {len(rest)} more, first {rest[0]}.')
    write_peft(PeftAdapter(updates, head), folder, args.base)
    print(f'Wrote {folder}: {len(updates)} updates{", a classifier" * bool(head)}.')


def main() -> None:
    """Do what is asked for."""
    args = parse_args()
    with preflight.clean_exit():
        bring_in(args) if args.command == 'import' else take_out(args)


if __name__ == '__main__':
    main()
