"""Every config parses, names only what exists, and its model builds; leaves are short and say what they are."""

import ast
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import import_modules_from_strings

from mmdyt import compat
from mmdyt.engine.names import check_types

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / 'configs').rglob('*.py'))
BASES = [path for path in FILES if '_base_' in path.parts]
LEAVES = [path for path in FILES if path not in BASES]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize('path', LEAVES, ids=name)
def test_config_parses_and_its_model_builds(path):
    compat.install()
    cfg = Config.fromfile(path, import_custom_modules=False)
    import_modules_from_strings(**cfg.custom_imports)
    check_types(cfg, cfg.default_scope)
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
        MODELS.build(cfg.model)


@pytest.mark.parametrize('path', FILES, ids=name)
def test_file_names_use_underscores_only(path):
    assert all(re.fullmatch(r'[a-z0-9_]+', part) for part in path.relative_to(ROOT).with_suffix('').parts)


@pytest.mark.parametrize('path', LEAVES, ids=name)
def test_leaf_is_short_and_says_how_to_run_it(path):
    module = ast.parse(path.read_text())
    docstring = ast.get_docstring(module)
    assert docstring and f'python tools/train.py {name(path)}' in docstring
    code = path.read_text().splitlines()[module.body[0].end_lineno :]
    assert sum(bool(line.strip()) for line in code) <= 30


@pytest.mark.parametrize('path', sorted((ROOT / 'configs' / 'dyt').rglob('*.py')), ids=name)
def test_docstring_names_the_number_of_the_paper_or_says_that_there_is_none(path):
    first = ast.get_docstring(ast.parse(path.read_text())).split('\n\n')[0]
    assert first.startswith('Dynamic Tuning (DyT), ')
    assert re.search(r'2403\.11808, .*table.*: \d+\.\d+', first) or 'no number in the paper' in first


@pytest.mark.parametrize('path', BASES, ids=name)
def test_every_base_is_used(path):
    assert any(f'{path.parent.name}/{path.name}' in leaf.read_text() for leaf in LEAVES)
