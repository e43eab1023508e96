"""From which checkpoint does a run go on, is all of its state in there, and what was changed since?"""

import ast
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config

from mmdyt.tuned.file import SUFFIX, is_whole

from .names import name_of
from .refusals import warn

# what a run goes on with is in the checkpoint's own state, which replaces the config's, or is the config's
KEPT = ('optim_wrapper.optimizer.', 'param_scheduler')
SAID = (*KEPT, 'optim_wrapper.', 'train_cfg.', 'auto_scale_lr.', 'train_dataloader.batch_size',
        'train_dataloader.num_workers', 'train_dataloader.sampler.', 'train_dataloader.drop_last')  # fmt: skip


def latest_checkpoint(cfg: Config) -> str | None:
    """The checkpoint that a run in the work dir goes on from; None if there is none.

    It is the one that ``last_checkpoint`` names, in the folder as it is now: it may have been moved or copied. Where
    that is missing or not whole, it is the newest whole one, and a line says so.

    Raises:
        ValueError: If there are checkpoints, and none is whole.
    """
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    folders = [Path(cfg.work_dir)]
    if hook.get('out_dir'):
        folders.append(Path(hook['out_dir'], folders[0].name))
    found = [path for folder in folders for path in _checkpoints(folder, hook)]
    note = folders[0] / 'last_checkpoint'
    said = note.read_text(encoding='utf-8', errors='replace').strip() if note.is_file() else ''
    if '://' in said:
        return said
    named = [folder / Path(said).name for folder in folders] if said else []
    whole = next((path for path in [*named, *found] if path.is_file() and _is_whole(path)), None)
    if whole is None and (said or found):
        raise ValueError(
            f'--resume must find a whole checkpoint in {folders[-1]}, got none. Without --resume the run starts anew.'
        )
    if whole is not None and whole not in named:
        warn(f'{note} names no whole checkpoint; the run goes on from {whole}, the newest that is whole.')
    return whole and str(whole)


def _checkpoints(folder: Path, hook: dict) -> list[Path]:
    """What a checkpoint hook has written into a folder, the newest first."""
    by_epoch = hook.get('by_epoch', True)
    suffix = SUFFIX if name_of(hook.get('type')).endswith('TunedCheckpointHook') else '.pth'
    own = hook.get('filename_tmpl') or ('epoch_{}' if by_epoch else 'iter_{}') + suffix
    other = ('iter_{}' if by_epoch else 'epoch_{}') + suffix  # of a run with another kind of loop
    found = []
    for place, template in enumerate((other, own)):
        pattern = r'(\d+)'.join(map(re.escape, template.split('{}')))
        steps = {path: re.fullmatch(pattern, path.name) for path in folder.glob('*')}
        found += [(place, int(step[1]), path) for path, step in steps.items() if step]
    return [path for *_, path in sorted(found, reverse=True)]


def _is_whole(path: Path) -> bool:
    """Whether a checkpoint was not cut short."""
    return is_whole(path) if path.suffix == SUFFIX else zipfile.is_zipfile(path)


def missing_state(checkpoint: dict, cfg: Config | None) -> list[str]:
    """The parts of a checkpoint that a run of this config would have to go on without."""
    needed = []
    if cfg is not None and cfg.get('param_scheduler'):
        needed.append('param_schedulers')
    hooks = (cfg.get('custom_hooks') or []) if cfg is not None else []
    if any(isinstance(hook, dict) and name_of(hook.get('type')).endswith('RNGStateHook') for hook in hooks):
        needed.append('rng_state')
    missing = [part for part in ('meta', 'message_hub', 'optimizer') if part not in checkpoint]
    return missing or [part for part in needed if part not in checkpoint]


def take_over_seed(meta: dict, cfg: Config) -> None:
    """Let a run without a seed of its own go on with the one that it drew: its data come in the order of that."""
    randomness = cfg.get('randomness') or {}
    if randomness.get('seed') is None and meta.get('seed') is not None:
        cfg.randomness = dict(randomness, seed=meta['seed'])


def say_changes(path: str, meta: dict, cfg: Config) -> None:
    """Print the settings of optimization that are not as they were when the checkpoint was written."""
    for name, old, new in changes(meta.get('cfg', ''), cfg.pretty_text):
        kept = name.startswith(KEPT) and not name.endswith('.type')
        effect = f', and stays {old}: its state is in {path}' if kept else f' in {path}'
        warn(f'{name} is {new} now, was {old}{effect}.')


def changes(before: str, after: str) -> list[tuple[str, object, object]]:
    """Settings of optimization in which two configs differ, as mmengine writes them: name, old value, new value."""
    try:
        old, new = (_read(text) for text in (before, after))
    except (SyntaxError, ValueError):
        return []
    if not old:  # not written by mmengine
        return []
    old, new = dict(_flat(old)), dict(_flat(new))
    names = [name for name in dict.fromkeys([*old, *new]) if name.startswith(SAID)]
    pairs = [(name, old.get(name, 'not set'), new.get(name, 'not set')) for name in names]
    return [(name, was, now) for name, was, now in pairs if was != now]


def _read(text: str) -> dict:
    """The settings in the text of a config, without running it."""
    return {node.targets[0].id: _value(node.value) for node in ast.parse(text).body if isinstance(node, ast.Assign)}


def _value(node: ast.expr):
    if isinstance(node, ast.Call) and not node.args:
        return {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {ast.unparse(key): _value(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:  # such as inf
        return ast.unparse(node)


def _flat(value, name: str = '') -> Iterator[tuple[str, object]]:
    """The leaves of nested dicts and lists under dotted names."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items:
        yield name, value
    for key, item in items:
        yield from _flat(item, f'{name}.{key}'.lstrip('.'))
