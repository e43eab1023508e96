"""The arrows of the package: what may import what."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOSTS = {'mmpretrain', 'mmseg', 'mmaction'}
TASKS = {'classifier', 'segmentor', 'recognizer'}
FILES = sorted((ROOT / 'mmdyt').rglob('*.py'))


def imports(path: Path) -> set[str]:
    found = set()
    package = ('.'.join(path.relative_to(ROOT).with_suffix('').parts)).rsplit('.', 1)[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = package.split('.')[: len(package.split('.')) + 1 - node.level] if node.level else []
            found.add('.'.join([*prefix, *([node.module] if node.module else [])]))
    return found


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path):
    names = imports(path)
    tops = {name.split('.')[0] for name in names}
    within = {name for name in names if name.startswith('mmdyt')}
    area = path.relative_to(ROOT / 'mmdyt').parts[0]
    assert not tops & {'tools', 'configs', 'tests'}
    if area == 'core':
        assert not {t for t in tops if t.startswith('mm') and t != 'mmdyt'}
        assert 'torchvision' not in tops and 'cv2' not in tops
        assert all(name.startswith('mmdyt.core') for name in within)
    if area == 'engine':
        assert not tops & HOSTS
        assert not {name for name in within if name.startswith(('mmdyt.models', 'mmdyt.datasets'))}
    if area == 'datasets':
        own = dict(svhn={'mmpretrain'}, clips={'mmaction'})
        assert tops & HOSTS <= own.get(path.stem, set())
        assert all(name == 'mmdyt.registry' or name.startswith('mmdyt.datasets') for name in within)
    if area == 'models':
        others = {f'mmdyt.models.{task}' for task in TASKS - {path.stem}}
        assert not within & others
        own = dict(
            vit={'mmpretrain'},
            encoder_layer={'mmpretrain'},
            necks={'mmpretrain'},
            classifier={'mmpretrain'},
            segmentor={'mmseg'},
            recognizer={'mmaction'},
        )
        assert tops & HOSTS <= own.get(path.stem, set())
    if path.name == '__init__.py' and path.parent.name == 'mmdyt':
        assert not names


def test_core_imports_with_torch_alone():
    core = set().union(*(imports(path) for path in FILES if 'core' in path.parts))
    allowed = {'torch', 'mmdyt', 'math', 're', 'collections', 'contextlib', 'dataclasses', 'functools', 'typing'}
    assert {name.split('.')[0] for name in core} <= allowed
