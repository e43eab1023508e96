"""What the result of a training run depends on, as hashes: two runs of one fingerprint need to be run once."""

import ast
import hashlib
import json
import os
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmengine.utils import import_modules_from_strings

import mmdyt

from .checkpoints import pretrained_cfgs
from .datasets import fetches_itself, nested

PACKAGE = Path(mmdyt.__file__).parent
# what no training runs: a change there changes no result
NOT_RUN = (
    '.mim',  # configs and tools of an installed wheel: what a run reads of a config is in its own hash
    'apis',
    'preflight',
    'files.py',
    'packaged.py',
    '__main__.py',
    'compat/configs.py',
    'compat/inferencers.py',
    'compat/saving.py',
    'engine/benchmark',
    'engine/runs.py',
    'engine/step_time.py',
    'engine/comparison.py',
    'engine/comparison_plot.py',
)
HOSTS = dict(mmpretrain='mmpretrain', mmseg='mmsegmentation', mmaction='mmaction2')


def fingerprint(cfg: Config, amp: bool) -> dict[str, str]:
    """Hash what matters to the result of training: the config, the data, the weights, the versions, our own source.

    Args:
        cfg: The config, merged with the command line. Where its work dir lies does not matter.
        amp: Whether mixed precision is used.
    """
    import_modules_from_strings(**cfg.get('custom_imports', dict(imports=[])))
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    return dict(
        config=_digest([cfg.to_dict() | dict(work_dir=None), amp]),
        data=_digest(list(_data(cfg))),
        weights=_digest(list(_weights(cfg))),
        versions=_digest(versions(cfg)),
        source=source(),
    )


def digest(marks: dict[str, str]) -> str:
    """One hash of a fingerprint."""
    return _digest(marks)


def versions(cfg: Config) -> dict[str, str]:
    """Versions of what a run is made of: mmdyt, torch, mmengine, mmpretrain, whose ViT it is, and the host library."""
    host = HOSTS.get(cfg.get('default_scope'), 'mmpretrain')
    found = {}
    for name in dict.fromkeys(('mmdyt', 'torch', 'mmengine', 'mmpretrain', host)):
        try:
            found[name] = mmdyt.__version__ if name == 'mmdyt' else version(name)
        except PackageNotFoundError:
            found[name] = 'not installed'
    return found


def source(package: Path = PACKAGE) -> str:
    """Hash of the package's code as far as training runs it; comments, docstrings and layout do not count."""
    files = sorted(path.relative_to(package).as_posix() for path in package.rglob('*.py'))
    return _digest([[file, _code(package / file)] for file in files if not file.startswith(NOT_RUN)])


def _code(file: Path) -> str:
    """The code of a file, or its text where that cannot be parsed."""
    text = file.read_text(encoding='utf-8')
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return text
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            node.body[0] = ast.Pass()
    return ast.dump(tree)


def _data(cfg: Config) -> Iterator[list]:
    """The content of every list that the data sets of training and validation read, or else their files and sizes."""
    for loop in ('train', 'val'):
        dataset = (cfg.get(f'{loop}_dataloader') or {}).get('dataset')
        for where, part in nested(dataset, loop):
            if not fetches_itself(part):
                yield [where, *_contents(part)]


def _contents(dataset: ConfigDict) -> Iterator:
    """The hash of a data set's list; without one the names and sizes of all files of its folders."""
    root = Path(dataset.get('data_root') or '').expanduser()
    if dataset.get('ann_file'):
        yield _content(root / dataset['ann_file'])
        return
    prefixes = dataset.get('data_prefix') or ''
    for prefix in prefixes.values() if isinstance(prefixes, dict) else [prefixes]:
        if dataset.get('data_root') or prefix:  # a wrapper has neither
            yield _files(root / prefix)


def _files(folder: Path) -> str:
    """Hash of the sorted names below a folder, with their sizes."""
    found = []
    for place, _, names in os.walk(folder):
        paths = [os.path.join(place, name) for name in names]
        found += [[os.path.relpath(path, folder), os.path.getsize(path)] for path in paths if os.path.exists(path)]
    return _digest(sorted(found))


def _weights(cfg: Config) -> Iterator[list]:
    """Hashes of the checkpoints that training starts from, by their places in the config."""
    paths = {where: init_cfg.get('checkpoint') for where, init_cfg in pretrained_cfgs(cfg.get('model'), 'model')}
    for where, path in (paths | dict(load_from=cfg.get('load_from'))).items():
        if path:
            yield [where, path if '://' in path else _content(Path(path).expanduser())]


def _content(file: Path) -> str:
    """Hash of a file's content; what is missing has one, too, and is refused by who needs it."""
    if not file.is_file():
        return 'missing'
    stat = file.stat()
    return _hash_file(str(file.resolve()), stat.st_size, stat.st_mtime_ns)


@cache
def _hash_file(path: str, size: int, time: int) -> str:
    """Hash of a file; read once in a process while size and time stay."""
    found = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
