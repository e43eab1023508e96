"""The config that a checkpoint carries: read as values, never run."""

import ast
import math
from contextlib import suppress

from mmengine.config import Config
from mmengine.utils import get_object_from_string, import_modules_from_strings

from .names import LIBRARIES, registries

HINT = 'Name the config file.'
# Modules whose classes may be built for a file that may come from anybody, by what they are built for. Being registered
# is not enough: there are types that evaluate an argument, unpickle or download, and a Runner.
TRUSTED = dict(
    model=(
        'mmdyt.models', 'mmdyt.parts', 'mmdyt.core', 'mmengine.model', 'mmcv.cnn', 'torch.nn',
        'mmpretrain.models.classifiers.image', 'mmpretrain.models.heads', 'mmpretrain.models.necks',
        'mmpretrain.models.losses', 'mmpretrain.models.utils.data_preprocessor',
        'mmpretrain.models.utils.batch_augments', 'mmseg.models.segmentors', 'mmseg.models.decode_heads',
        'mmseg.models.losses', 'mmseg.models.necks', 'mmseg.models.data_preprocessor', 'mmseg.structures',
        'mmaction.models.recognizers', 'mmaction.models.heads', 'mmaction.models.losses',
        'mmaction.models.data_preprocessors', 'mmaction.models.utils',
    ),
    pipeline=(
        'mmdyt.datasets', 'mmcv.transforms', 'mmpretrain.datasets.transforms', 'mmseg.datasets.transforms',
        'mmaction.datasets.transforms.loading', 'mmaction.datasets.transforms.processing',
        'mmaction.datasets.transforms.formatting',
    ),
)  # fmt: skip
REFUSED = ('Albu', 'Albumentations')  # which build what they are told from another library, as 'torchvision/...' do
NUMBERS = dict(inf=math.inf, nan=math.nan)  # as mmengine writes them


def carried_config(checkpoint: dict, path: str) -> Config:
    """What inference needs of the config that mmengine's runner wrote into a checkpoint, as text.

    A checkpoint may come from anybody, and nothing in it is run: the text is read as plain values, modules of
    OpenMMLab and of this package are the only ones that are imported, and types must be registered in them. mmengine
    itself would execute the text, and call whatever function a dotted type names.

    Args:
        checkpoint: From :func:`mmdyt.preflight.checkpoints.read_checkpoint`.
        path: Of it, for messages.

    Returns:
        ``model``, ``default_scope``, ``custom_imports`` and ``test_dataloader.dataset`` with ``pipeline`` and
        ``metainfo``, as far as they are there.

    Raises:
        ValueError: If there is no config, or there is code in it, or a module or type that is not known.
    """
    values = read_values(config_text(checkpoint, path), path)
    kept = {key: values[key] for key in ('model', 'default_scope', 'custom_imports') if values.get(key) is not None}
    if isinstance(kept.get('model'), dict) and values.get('data_preprocessor') is not None:
        kept['model'].setdefault('data_preprocessor', values['data_preprocessor'])
    dataset = _innermost(values.get('test_dataloader') or values.get('val_dataloader'))
    kept['test_dataloader'] = dict(dataset={k: dataset[k] for k in ('pipeline', 'metainfo') if k in dataset})
    _check_imports(kept, path)
    scope = kept.setdefault('default_scope', 'mmengine')
    _check_scope(scope, 'default_scope', path)
    import_modules_from_strings(kept.get('custom_imports', {}).get('imports', []))
    _check_registered(dict(model=kept.get('model'), pipeline=dataset.get('pipeline')), scope, '', path)
    return Config(kept)


def _innermost(loader) -> dict:
    """The data set of a loader within whatever repeats or joins such."""
    dataset = loader.get('dataset') if isinstance(loader, dict) else None
    while isinstance(dataset, dict) and 'pipeline' not in dataset:
        parts = dataset.get('datasets')
        inner = parts[0] if isinstance(parts, list | tuple) and parts else dataset.get('dataset')
        if not isinstance(inner, dict):
            break
        dataset = inner
    return dataset if isinstance(dataset, dict) else {}


def config_text(checkpoint: dict, path: str) -> str:
    """The config in a checkpoint, as text.

    Raises:
        ValueError: If there is none.
    """
    hub = checkpoint.get('message_hub') or {}
    texts = (checkpoint.get('meta') or {}).get('cfg'), (hub.get('runtime_info') or {}).get('cfg')
    text = next((text for text in texts if isinstance(text, str) and text.strip()), None)
    if text is None:
        raise ValueError(f'checkpoint must carry a config where none is named, got none in {path}. {HINT}')
    return text


def read_values(text: str, path: str) -> dict:
    """What the text of a config assigns, of constants, lists, tuples and dicts; nothing is run.

    Args:
        text: Python, as ``Config.pretty_text`` has it.
        path: Of the file that it comes from, for messages.

    Raises:
        ValueError: Naming the first thing that is none of these.
    """
    try:
        statements = ast.parse(text).body
        for node in statements:
            if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and not node.targets[1:]):
                raise _Code(node)
        return {node.targets[0].id: _value(node.value) for node in statements}
    except _Code as code:
        raise ValueError(
            f'checkpoint must carry a config of plain values, got {_words(code.node)} in line '
            f'{code.node.lineno} of that in {path}. Code of a checkpoint is never run. {HINT}'
        ) from None
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(
            f'checkpoint must carry a config that can be read, got {type(error).__name__} in that of {path}. {HINT}'
        ) from error


class _Code(Exception):
    """What is no value."""

    def __init__(self, node: ast.AST):
        super().__init__()
        self.node = node


def _words(node: ast.AST) -> str:
    """How code begins, in one line."""
    return ' '.join(ast.unparse(node).split())[:80]


def _value(node: ast.expr):
    """The value that an expression writes down."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        kind = dict(List=list, Tuple=tuple, Set=set)[type(node).__name__]
        return kind(_value(item) for item in node.elts)
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
        given = [_value(arg) for arg in node.args]
        named = {keyword.arg: _value(keyword.value) for keyword in node.keywords}
        if all(isinstance(arg, dict) for arg in given) and len(given) <= 1 and None not in named:
            return dict(*given, **named)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        number = _value(node.operand)
        if isinstance(number, int | float):
            return -number if isinstance(node.op, ast.USub) else number
    if isinstance(node, ast.Name) and node.id in NUMBERS:
        return NUMBERS[node.id]
    raise _Code(node)


def _check_imports(cfg: dict, path: str) -> None:
    """Refuse to import for a checkpoint what is not OpenMMLab's or ours: importing a module runs it."""
    imports = cfg.get('custom_imports', {})
    names = imports.get('imports', []) if isinstance(imports, dict) else None
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'custom_imports must list modules in the config of {path}, got {imports!r}. {HINT}')
    for name in names:
        _check_scope(name.split('.')[0], 'custom_imports', path)


def _check_scope(scope, where: str, path: str) -> None:
    if scope not in LIBRARIES:
        raise ValueError(
            f'{where} must name one of {", ".join(LIBRARIES)} in a config that a checkpoint carries, got {scope!r} '
            f'in {path}. {HINT}'
        )


def _check_registered(node, scope: str, where: str, path: str) -> None:
    """Refuse a type that no registry holds, which mmengine would look for among all modules that there are."""
    if isinstance(node, list | tuple):
        for i, value in enumerate(node):
            _check_registered(value, scope, f'{where}[{i}]', path)
    if not isinstance(node, dict):
        return
    scope = node.get('_scope_', scope)
    _check_scope(scope, f'{where}._scope_'.lstrip('.'), path)
    kind = node.get('type')
    if 'type' in node and not (isinstance(kind, str) and _trusted(_registered(kind, scope), kind, where)):
        raise ValueError(
            f'{where.lstrip(".")}.type must be a registered type that predicting needs in a config that a checkpoint '
            f'carries, got {kind!r} in {path}. {HINT}'
        )
    for key, value in node.items():
        _check_registered(value, scope, f'{where}.{key}', path)


def _trusted(found: list, kind: str, where: str) -> bool:
    """Whether whatever mmengine may find by a type is one of the classes that are built for files of anybody."""
    modules = TRUSTED[where.lstrip('.').partition('.')[0].partition('[')[0]]
    names = [f'{one.__module__}.' for one in found]
    safe = all(name.startswith(tuple(f'{module}.' for module in modules)) for name in names)
    return bool(found) and safe and '/' not in kind and kind.rpartition('.')[2] not in REFUSED


def _registered(kind: str, scope: str) -> list:
    """What registries hold that mmengine may find by a name, ``scope.name``, or a whole path within a library."""
    prefix, _, name = kind.rpartition('.')
    library = prefix.split('.')[0] or scope
    if library not in LIBRARIES:
        return []
    known = [registry.module_dict for registry in registries(library)]
    if prefix in ('', library):
        return [names[name] for names in known if name in names]
    with suppress(Exception):  # whatever importing a module that is not there may raise
        found = get_object_from_string(kind)  # as Python-style configs name classes
        return [one for names in known for one in names.values() if one is found]
    return []
