"""Is every registered type that a config names known?"""

import difflib
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec

from mmengine import registry as mmengine_registry
from mmengine.registry import Registry
from mmengine.utils import get_object_from_string

FOREIGN = ('Albu', 'Albumentations', 'ImgAug')  # transforms of mmseg, mmpretrain, mmaction around another library's
# whose classes take dicts with registered types only; torch's optimizers and the like take none at all
LIBRARIES = ('mmengine', 'mmcv', 'mmdet', 'mmpretrain', 'mmseg', 'mmaction', 'mmdyt')


def check_types(node, scope: str, where: str = '') -> None:
    """Refuse the first ``type`` in a config that no registry knows.

    Below transforms of other libraries, and below classes of a user's own, types may be named as these like it.

    Args:
        node: A config, or a part of one.
        scope: The default scope: names of this host need no prefix.
        where: Path of ``node`` in the config, for the message.

    Raises:
        KeyError: Naming the place and near matches.
    """
    if isinstance(node, dict):
        scope = node.get('_scope_', scope)
        kind = node.get('type')
        if isinstance(kind, str) and not _known(kind, scope):
            raise KeyError(
                f'{where.lstrip(".")}.type must be a registered type, got {kind!r}.{near(kind, _names(scope))}'
            )
        if kind is not None and is_foreign(kind, scope):
            return
        for key, value in node.items():
            check_types(value, scope, f'{where}.{key}')
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            check_types(value, scope, f'{where}[{i}]')


def near(word: str, names: Sequence[str]) -> str:
    """The end of a message: up to three names that look like ``word``, or nothing."""
    matches = difflib.get_close_matches(word, sorted(set(names)), n=3, cutoff=0.6)
    return f' Did you mean {", ".join(matches)}?' if matches else ''


def name_of(kind) -> str:
    """The name of a type as a config has it: a string, or in a Python-style config the class itself."""
    return kind if isinstance(kind, str) else getattr(kind, '__name__', str(kind))


def _known(kind: str, scope: str) -> bool:
    """Whether mmengine will find ``kind``: by name, by ``scope.name`` or by a full Python path."""
    return find(kind, scope) is not None


def find(kind: str, scope: str):
    """What mmengine will find by the name ``kind``, or None."""
    prefix, _, name = kind.rpartition('.')
    if prefix and '.' not in prefix and find_spec(prefix) and find_spec(f'{prefix}.registry'):
        scope = prefix
    elif prefix:
        return get_object_from_string(kind)
    return next((r.module_dict[name] for r in registries(scope) if name in r.module_dict), None)


def is_foreign(kind, scope: str) -> bool:
    """Whether a type takes dicts with a ``type`` that no registry of OpenMMLab holds."""
    if name_of(kind).rpartition('.')[2] in FOREIGN:
        return True
    found = find(kind, scope) if isinstance(kind, str) else kind
    return getattr(found, '__module__', 'mmengine').split('.')[0] not in LIBRARIES


def registries(scope: str) -> Iterator[Registry]:
    """Mmengine's registries and those of one host, filled; some of the latter have no parent in mmengine."""
    host = import_module(f'{scope}.registry') if find_spec(scope) and find_spec(f'{scope}.registry') else None
    orphans = [r for r in vars(host).values() if isinstance(r, Registry) and r.parent is None] if host else []
    roots = [root for root in vars(mmengine_registry).values() if isinstance(root, Registry)]
    for registry in [r for root in roots for r in (root, root.children.get(scope))] + orphans:
        if registry is not None:
            _fill(registry)
            yield registry


def _fill(registry: Registry) -> None:
    """Import the modules that register into ``registry``."""
    try:
        registry.import_from_location()
    except ModuleNotFoundError as error:
        # mmaction2 1.2.0 has a registry (FUNCTION) whose own module was never written; nothing registers into it
        if error.name not in registry._locations:
            raise


def _names(scope: str) -> list[str]:
    """What a user may have meant: names of the default scope, and prefixed ones of the other loaded scopes."""
    names = [name for registry in registries(scope) for name in registry.module_dict]
    roots = [root for root in vars(mmengine_registry).values() if isinstance(root, Registry)]
    children = [child for root in roots for child in root.children.values()]
    return names + [f'{child.scope}.{name}' for child in children for name in child.module_dict]
