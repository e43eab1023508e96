"""Is a key of a config read by anyone?"""

import difflib
import re
from collections.abc import Mapping, Sequence
from inspect import signature

from mmengine.config import Config
from mmengine.runner import Runner

from .names import find, is_foreign, near

# what mmengine, the hosts and the tools read besides the arguments of a runner
READ = ('custom_imports', 'runner_type', 'strategy', 'compile', 'model_wrapper_cfg', 'find_unused_parameters',
        'sync_bn', 'activation_checkpointing', 'efficient_conv_bn_eval', 'tta_model', 'tta_pipeline',
        'own_keys')  # fmt: skip
KNOWN = (*(set(signature(Runner).parameters) - {'cfg'}), *READ)
PARAMWISE = ('custom_keys', 'bias_lr_mult', 'bias_decay_mult', 'norm_decay_mult', 'dwconv_decay_mult',
             'dcn_offset_lr_mult', 'flat_decay_mult', 'bypass_duplicate')  # fmt: skip
MULTIPLIERS = ('lr_mult', 'decay_mult')  # of a parameter
CLOSE = 0.9  # of difflib: one letter of a short word, two of a long one


def check_keys(cfg: Config) -> None:
    """Refuse a key at the top of a config that is a misspelt one; variables of any other name are the user's own.

    Raises:
        KeyError: Naming both.
        ValueError: If ``own_keys`` is no list of names.
    """
    own = own_keys(cfg)
    for key in cfg:
        _check_near(key, KNOWN, 'config', own)


def own_keys(cfg: Mapping) -> Sequence[str]:
    """Names that a config lists as read by code of the user's own, however near they are to others.

    Raises:
        ValueError: If it lists something else.
    """
    own = cfg.get('own_keys') or []
    if not (isinstance(own, list | tuple) and all(isinstance(key, str) for key in own)):
        raise ValueError(f'own_keys must be a list of names, got {own!r}.')
    return own


def check_options(cfg: Config, options: Mapping) -> None:
    """Refuse an option of the command line at the top of a config, where neither the config nor a host knows it.

    Args:
        cfg: The config without the options.
        options: By their paths.

    Raises:
        KeyError: Naming it, and keys that look like it.
    """
    for option in options:
        key = option.split('.')[0]
        if key not in cfg and key not in KNOWN:
            known = {*KNOWN, *cfg}
            raise KeyError(f'--cfg-options must name a key of the config, got {option}.{near(key, known)}')


def check_arguments(node, scope: str, where: str = '', own: Sequence[str] = ()) -> None:
    """Refuse a misspelt argument of a class that takes any; others refuse it themselves, but later.

    Args:
        node: A config, or a part of one; its types are registered.
        scope: The default scope.
        where: Path of ``node`` in the config, for the message.
        own: Of :func:`own_keys`.

    Raises:
        KeyError: Naming both.
    """
    if isinstance(node, list | tuple):
        for i, value in enumerate(node):
            check_arguments(value, scope, f'{where}[{i}]', own)
    if not isinstance(node, dict):
        return
    scope = node.get('_scope_', scope)
    kind = node.get('type')
    if kind is not None and is_foreign(kind, scope):
        return
    found = find(kind, scope) if isinstance(kind, str) else kind
    known = _arguments(found) if isinstance(found, type) else []
    for key, value in node.items():
        _check_near(key, known, where.lstrip('.'), own)
        check_arguments(value, scope, f'{where}.{key}', own)


def _arguments(kind: type) -> list[str]:
    """What a class and those that it is made of name as arguments."""
    constructors = [vars(base)['__init__'] for base in kind.__mro__[:-1] if '__init__' in vars(base)]
    return list(dict.fromkeys(name for one in constructors for name in _names(one)))


def _names(constructor) -> list[str]:
    try:
        return list(signature(constructor).parameters)
    except (TypeError, ValueError):  # of a class in C
        return []


def check_paramwise(optim_wrapper: Mapping, own: Sequence[str] = ()) -> None:
    """Refuse a misspelt key of ``paramwise_cfg``, or one in the wrong place: nobody would know.

    Args:
        optim_wrapper: Its config.
        own: Of :func:`own_keys`.

    Raises:
        KeyError: Naming what it must be.
    """
    paramwise = optim_wrapper.get('paramwise_cfg')
    if not isinstance(paramwise, Mapping):
        return
    for key in paramwise:
        if key in MULTIPLIERS or key not in own and misspelt(key, MULTIPLIERS):
            raise KeyError(f'paramwise_cfg must have {key} in custom_keys, by names of parameters, got it in none.')
        _check_near(key, PARAMWISE, 'paramwise_cfg', own)
    for name, options in (paramwise.get('custom_keys') or {}).items():
        for key in options if isinstance(options, Mapping) else ():
            _check_near(key, MULTIPLIERS, f'paramwise_cfg.custom_keys.{name}', own)


def _check_near(key: str, known: Sequence[str], where: str, own: Sequence[str]) -> None:
    if isinstance(key, str) and key not in (*known, *own) and (meant := misspelt(key, known)):
        raise KeyError(
            f'{where} must have no key that nothing reads, got {key}. Did you mean {meant}? If code of your own reads '
            f'it, say so at the top of the config: own_keys = [{key!r}].'
        )


def misspelt(key: str, known: Sequence[str]) -> str | None:
    """The name that a key nearly is; a number or an underscore at its end makes another name of it."""
    if re.sub(r'^_|_?\d*$', '', key) in known:
        return None
    turned = [name for name in known if sorted(name) == sorted(key)]
    long = [name for name in known if len(name) > len('model')]  # some configs have a list of ``models``
    return next(iter(turned + difflib.get_close_matches(key, long, n=1, cutoff=CLOSE)), None)
