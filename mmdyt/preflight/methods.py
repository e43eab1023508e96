"""Put a method, named on the command line, in the place of the one that a config has."""

import inspect
from collections.abc import Mapping
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import mmdyt.registry  # noqa: F401  makes the parts known
from mmdyt.core.part import FILLED_IN
from mmdyt.packaged import CONFIGS

from .names import near

FOLDERS = (Path('configs/_base_/methods'), CONFIGS / '_base_' / 'methods')
BACKBONE = 'mmdyt.DyTVisionTransformer'
PARTS = ('adapter', 'dispatcher', 'substitute')
WEIGHTS = ('rate_weight', 'complete_weight', 'distill_weight')
HOOKS = ('mmdyt.EvidenceHook', 'mmdyt.CalibrationHook', 'mmdyt.TauScheduleHook', 'mmdyt.KeepRateHook')
BRING_WEIGHTS = ('mmdyt.HaltingDispatcher',)  # dispatchers whose methods set the weights of losses
TRAINED = ('noise', 'fitted')  # how a dispatcher is trained, which a method says and no config keeps
NO_OPTIONS = {'self', 'block', 'options', *FILLED_IN}
# of the backbone, which a method leaves alone
SWITCHES = ('dispatch', 'keys', 'training', 'inference', 'break_even', 'decide_per', 'restore', 'skip_unread')


def known_methods() -> list[str]:
    """Names of the methods that there are."""
    return sorted({path.stem for folder in FOLDERS for path in folder.glob('*.py')})


def read_method(name: str) -> dict:
    """What a method's file says: ``method``, the backbone's arguments, and ``method_model``, ``_hooks``, ``_lr``.

    Raises:
        ValueError: If there is no such method.
    """
    for folder in FOLDERS:
        if name in {path.stem for path in folder.glob('*.py')}:
            return Config.fromfile(folder / f'{name}.py', import_custom_modules=False).to_dict()
    known = known_methods()
    raise ValueError(f'--method must be among {known}, or several joined by +, got {name!r}.{near(name, known)}')


def use_method(cfg: Config, method: str, options: Mapping | None = None) -> None:
    """Replace the method of a config; data, schedule, heads and the wanted rate stay.

    What belongs to a method: the backbone's parts and what is tuned, the hooks that fit and calibrate, and the weights
    of losses that come with these. Options that the config has for a part of the same type (an adapter's bottleneck)
    are kept.

    Args:
        cfg: Changed in place.
        method: A name such as ``'lora'``, or several: ``'lora+evidence'`` has the parts of both.
        options: Overrides, by a path in the backbone's arguments (``adapter.bottleneck``, ``adapter``: None), in the
            model's (``target_rate``), in the hooks (``hooks.0.begin``), or an argument of the method's part (``rank``).

    Raises:
        ValueError: If the method or an option is unknown, or the backbone takes no parts.
    """
    backbone = (cfg.get('model') or {}).get('backbone')
    if not isinstance(backbone, Mapping) or backbone.get('type') != BACKBONE:
        kind = backbone.get('type') if isinstance(backbone, Mapping) else backbone
        raise ValueError(f'--method must find a {BACKBONE} in model.backbone, got {kind!r}.')
    found = _joined([read_method(name) for name in method.split('+')])
    for key, value in (options or {}).items():
        _set_option(found, key, value)
    _keep_options(found['backbone'], backbone)
    brought = (backbone.get('dispatcher') or {}).get('type') in BRING_WEIGHTS
    for key in (*PARTS, 'parts', 'tuned'):
        backbone.pop(key, None)
    backbone.update(found['backbone'])
    if brought or any(hook.get('type') in HOOKS[:1] for hook in cfg.get('custom_hooks') or []):
        for key in WEIGHTS:  # they were the former method's
            cfg.model.pop(key, None)
    if str(cfg.model.get('type', '')).startswith('mmdyt.'):
        cfg.model.update(found['model'])
    hooks = [hook for hook in cfg.get('custom_hooks') or [] if hook.get('type') not in HOOKS]
    cfg.custom_hooks = [*hooks, *found['hooks']]
    if cfg.get('optim_wrapper') and found['lr'] != 1:
        cfg.optim_wrapper.optimizer.lr *= found['lr']


def _joined(methods: list[dict]) -> dict:
    """Several methods as one: the parts of all, and of two settings the later one that is not None."""
    joined = dict(backbone={}, model={}, hooks=[], lr=1.0)
    for found in methods:
        for key, value in found['method'].items():
            if key == 'parts' or (key == 'tuned' and isinstance(value, list)):
                before = joined['backbone'].get(key) or []
                value = before if isinstance(before, str) else [*before, *value]
            before = joined['backbone'].get(key)
            if isinstance(value, dict) and isinstance(before, dict) and before.get('type') == value.get('type'):
                value = before | value
            if value is not None or key not in joined['backbone']:
                joined['backbone'][key] = value
        joined['model'] |= found.get('method_model', {})
        joined['hooks'] += found.get('method_hooks', [])
        joined['lr'] *= found.get('method_lr', 1.0)
    return joined


def _set_option(found: dict, key: str, value) -> None:
    """Override one setting of a method."""
    first, *path = key.split('.')
    backbone = found['backbone']
    if first in (*PARTS, *SWITCHES, 'parts', 'tuned'):
        _set_path(backbone, [first, *path], value, key)
    elif first == 'hooks':
        _set_path(found, [first, *path], value, key)
    elif first in ('target_rate', *WEIGHTS):
        found['model'][first] = value
    else:
        configs = backbone.get('parts') or [c for c in (backbone.get(name) for name in PARTS) if c]
        takers = [config for config in configs if first in _arguments(config)]
        if path or not takers:
            own = {name for config in configs for name in _arguments(config)}
            known = sorted(own | {*PARTS, *SWITCHES, *WEIGHTS, 'parts', 'tuned', 'target_rate', 'hooks'})
            raise ValueError(f'--method-options must name one of {known}, got {key!r}.{near(key, known)}')
        for config in takers:
            config[first] = value


def _set_path(node, path: list[str], value, key: str) -> None:
    """Set a value deep in dicts and lists; a dict that is missing on the way is made."""
    *way, last = path
    for step in way:
        if isinstance(node, list):
            if not (step.isdigit() and int(step) < len(node)):
                raise ValueError(f'--method-options must stay within the method, got {key!r}.')
            node = node[int(step)]
        else:
            node[step] = node.get(step) if isinstance(node.get(step), dict | list) else {}
            node = node[step]
    if isinstance(node, list):
        if not (last.isdigit() and int(last) < len(node)):
            raise ValueError(f'--method-options must stay within the method, got {key!r}.')
        last = int(last)
    node[last] = value


def _arguments(config: Mapping) -> set[str]:
    """What a config of a part may say beside its type."""
    init_default_scope('mmengine')
    kind = MODELS.get(config['type'])
    if kind is None:
        return set()
    names = {*inspect.signature(kind.__init__).parameters, *inspect.signature(kind.add_to).parameters, 'layers'}
    return names - NO_OPTIONS


def _keep_options(new: dict, old: Mapping) -> None:
    """Keep what the config says of a part of the same type."""
    for name, kind in dict(adapter='mmdyt.Adapter', dispatcher='mmdyt.TokenDispatcher').items():
        before, after = old.get(name), new.get(name)
        if before and after and before.get('type', kind) == after.setdefault('type', kind):
            new[name] = {key: value for key, value in before.items() if key not in TRAINED} | after
