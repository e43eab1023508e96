"""The arrows of the package: what may import what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARIES = {'mmpretrain', 'mmseg', 'mmaction'}
TASKS = {'classifier', 'segmentor', 'recognizer'}
FILES = sorted((ROOT / 'mmdyt').rglob('*.py'))
# what each area may import of the package, itself apart
WITHIN = dict(
    core=(),
    parts=('mmdyt.core',),
    hosts=('mmdyt.core',),
    adapting=('mmdyt.core', 'mmdyt.parts', 'mmdyt.hosts', 'mmdyt.files', 'mmdyt.tuned.fingerprint'),
    models=('mmdyt.core', 'mmdyt.parts', 'mmdyt.hosts', 'mmdyt.registry', 'mmdyt.compat'),
    engine=('mmdyt.core', 'mmdyt.registry', 'mmdyt.files', 'mmdyt.tuned'),
    preflight=('mmdyt.core', 'mmdyt.registry', 'mmdyt.files', 'mmdyt.compat', 'mmdyt.tuned', 'mmdyt.packaged'),
    tuned=('mmdyt.core', 'mmdyt.files'),
    datasets=('mmdyt.registry', 'mmdyt.files'),
    # on top: nothing imports it
    apis=(
        'mmdyt.core',
        'mmdyt.models',
        'mmdyt.datasets',
        'mmdyt.engine',
        'mmdyt.preflight',
        'mmdyt.files',
        'mmdyt.tuned',
    ),  # fmt: skip
    registry=(),
    compat=('mmdyt.files', 'mmdyt.tuned', 'mmdyt.packaged'),
    files=(),
    packaged=(),
    __main__=('mmdyt.packaged',),
    weights=(),
)
# and of OpenMMLab's libraries, by file, mmengine and mmcv apart
OWN = {
    'hosts/mmpretrain': 'mmpretrain',
    'models/vit': 'mmpretrain',
    'models/classifier': 'mmpretrain',
    'models/segmentor': 'mmseg',
    'models/recognizer': 'mmaction',
    'datasets/svhn': 'mmpretrain',
    'datasets/clips': 'mmaction',
    'datasets/class_folders': 'mmpretrain',
    'datasets/masks': 'mmseg',
    'datasets/clip_folders': 'mmaction',
}
STANDARD = {'collections', 'contextlib', 'contextvars', 'dataclasses', 'functools', 'math', 'numbers', 're', 'typing'}
# what comes with a torch for GPUs, and how it is told to be left alone; what users are told; where parts are found
OPTIONAL = {
    'core/kernels': {'triton', 'os', 'warnings'},
    'core/telling': {'warnings'},
    'parts/__init__': {'pkgutil', 'importlib'},
}
# blocks other libraries, then imports every module of core and parts, of what adapts the networks of other libraries,
# and all their tests
BARE = """
import importlib.util, pkgutil, sys
from pathlib import Path

BARE = 'core', 'parts', 'hosts', 'adapting'
ALONE = 'mmdyt', 'mmdyt.files', 'mmdyt.tuned', 'mmdyt.tuned.fingerprint', 'mmap'

class Blocked:
    def find_spec(self, name, path=None, target=None):
        ours = name in ALONE or name.startswith(tuple(f'mmdyt.{area}' for area in BARE))
        if name.startswith(('mm', 'cv2', 'torchvision', 'decord', 'timm', 'transformers')) and not ours:
            raise ImportError(f'{name} must not be imported')

sys.meta_path.insert(0, Blocked())
found = []
for area in BARE:
    package = importlib.import_module(f'mmdyt.{area}')
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):
        if info.name != 'mmdyt.hosts.mmpretrain':
            importlib.import_module(info.name)
            found.append(info.name)
tests = Path('tests')
sys.path[:0] = [str(tests), *(str(tests / area) for area in ('core', 'core/fit', 'parts', 'adapting'))]
for area in ('core', 'parts', 'adapting'):
    for path in sorted((tests / area).rglob('test_*.py')):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        found.append(path.stem)
print(*found)
"""


def imports(path: Path) -> set[str]:
    """Modules that a file imports, and what it takes from packages."""
    found = set()
    package = ('.'.join(path.relative_to(ROOT).with_suffix('').parts)).rsplit('.', 1)[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = package.split('.')[: len(package.split('.')) + 1 - node.level] if node.level else []
            module = '.'.join([*prefix, *([node.module] if node.module else [])])
            inner = {f'{module}.{alias.name}' for alias in node.names} if module == 'mmdyt' else set()
            found |= inner or {module}
    return found


def area(path: Path) -> str:
    """Of a file."""
    return path.relative_to(ROOT / 'mmdyt').with_suffix('').parts[0]


def of(name: str, packages) -> bool:
    """Whether a module is one of some packages, or in one."""
    return any(name == package or name.startswith(f'{package}.') for package in packages)


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path):
    names = imports(path)
    tops = {name.split('.')[0] for name in names}
    within = {name for name in names if of(name, ['mmdyt'])}
    here, key = area(path), path.relative_to(ROOT / 'mmdyt').with_suffix('').as_posix()
    assert not tops & {'tools', 'configs', 'tests'}
    if here == '__init__':  # its verb imports what it needs when it is called
        assert names <= {'mmdyt.adapting.adapt'}
        assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(path.read_text()).body)
        return
    assert not {name for name in within if name != 'mmdyt' and not of(name, [f'mmdyt.{here}', *WITHIN[here]])}
    assert tops & LIBRARIES <= {OWN.get(key)}
    if here in ('core', 'parts'):
        assert tops <= {'torch', 'mmdyt'} | STANDARD | OPTIONAL.get(key, set())
    if here == 'models':
        assert not within & {f'mmdyt.models.{task}' for task in TASKS - {path.stem}}


def test_core_and_parts_and_their_tests_import_on_bare_torch():
    """In a process where nothing that is built on OpenMMLab can be imported."""
    result = subprocess.run([sys.executable, '-c', BARE], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    found = set(result.stdout.split())
    bare = ('core', 'parts', 'hosts', 'adapting')
    modules = [path for path in FILES if area(path) in bare and path.stem not in ('__init__', 'mmpretrain')]
    assert {'.'.join(path.relative_to(ROOT).with_suffix('').parts) for path in modules} <= found
    assert {'test_block', 'test_calibrate', 'test_dispatcher', 'test_adapt'} <= found


def test_names_of_tests_are_unique():
    """They are no packages: two of one name would be one module."""
    stems = [path.stem for path in (ROOT / 'tests').rglob('*.py')]
    assert len(set(stems)) == len(stems)
