"""Every config parses, names only what exists, and its model builds; leaves are short and say what they are."""

import ast
import re
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import import_modules_from_strings
from own_worlds import DRAW

from mmdyt import compat
from mmdyt.engine.shapes import shapes_only
from mmdyt.preflight.methods import known_methods, read_method
from mmdyt.preflight.names import check_types
from mmdyt.preflight.own_data import fill_from_data

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / 'configs').rglob('*.py'))
BASES = [path for path in FILES if '_base_' in path.parts]
LEAVES = [path for path in FILES if path not in BASES]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize('path', LEAVES, ids=name)
def test_config_parses_and_its_model_builds(path, tmp_path):
    compat.install()
    cfg = Config.fromfile(path, import_custom_modules=False)
    if path.parent.name == 'own':
        cfg.own.root = str(DRAW[path.stem](tmp_path))
        fill_from_data(cfg)
    import_modules_from_strings(**cfg.custom_imports)
    check_types(cfg, cfg.default_scope)
    with DefaultScope.overwrite_default_scope(cfg.default_scope), shapes_only():
        MODELS.build(cfg.model)


@pytest.mark.parametrize('path', LEAVES, ids=name)
def test_a_run_without_numbers_is_stopped(path):
    cfg = Config.fromfile(path, import_custom_modules=False)
    assert cfg.default_hooks.finite == dict(type='mmdyt.FiniteHook')


@pytest.mark.parametrize('path', FILES, ids=name)
def test_file_names_use_underscores_only(path):
    assert all(re.fullmatch(r'[a-z0-9_]+', part) for part in path.relative_to(ROOT).with_suffix('').parts)


@pytest.mark.parametrize('path', LEAVES, ids=name)
def test_leaf_is_short_and_says_how_to_run_it(path):
    module = ast.parse(path.read_text())
    docstring = ast.get_docstring(module)
    assert docstring and re.search(rf'python tools/train(_compensator)?\.py {name(path)}', docstring)
    code = path.read_text().splitlines()[module.body[0].end_lineno :]
    assert sum(bool(line.strip()) for line in code) <= 30


@pytest.mark.parametrize('path', [leaf for leaf in LEAVES if leaf.parent.name != 'demo'], ids=name)
def test_docstring_names_the_number_of_the_paper_or_says_that_there_is_none(path):
    first = ast.get_docstring(ast.parse(path.read_text())).split('\n\n')[0]
    if path.parent.name == 'dyt':
        assert first.startswith(('Dynamic Tuning (DyT), ', 'Dynamic Tuning (DyT) '))
    papers = dict(sparse_tuning=r'2405\.14700, figure', avit=r'2112\.07658, table')
    paper = papers.get(path.parent.name, r'2403\.11808, .*table')
    assert re.search(paper + r'.*: \d+\.\d+', first) or re.search('no number (in the paper|known)', first)


def test_ade20k_is_the_papers_recipe():
    """arXiv 2403.11808, appendix: segmentation."""
    cfg = Config.fromfile(ROOT / 'configs/dyt/upernet_vitb_ade20k.py', import_custom_modules=False)
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1e-3, 0.05)
    assert cfg.train_dataloader.batch_size == 16 and cfg.train_cfg.max_iters == 160000
    warm_up, decay = cfg.param_scheduler
    assert (warm_up.type, warm_up.start_factor, warm_up.end) == ('LinearLR', 1e-6, 1500)
    assert (decay.type, decay.power, decay.begin, decay.end) == ('PolyLR', 1.0, 1500, 160000)
    assert (cfg.model.target_rate, cfg.model.rate_weight) == (0.5, 2.0)
    backbone = cfg.model.backbone
    assert (backbone.arch, backbone.drop_path_rate, backbone.out_indices) == ('base', 0.1, (3, 5, 7, 11))
    assert (backbone.adapter.bottleneck, backbone.adapter.scale, backbone.dispatcher.tau) == (64, 0.1, 5.0)
    assert (backbone.final_norm, backbone.out_type, backbone.img_size) == (False, 'featmap', (512, 512))
    assert cfg.model.neck.rescales == [4, 2, 1, 0.5]
    head, auxiliary = cfg.model.decode_head, cfg.model.auxiliary_head
    assert (head.type, head.channels, head.pool_scales, head.dropout_ratio) == ('UPerHead', 768, (1, 2, 3, 6), 0.1)
    assert (auxiliary.type, auxiliary.in_index, auxiliary.channels) == ('FCNHead', 2, 256)
    assert auxiliary.loss_decode.loss_weight == 0.4 and head.num_classes == auxiliary.num_classes == 150
    assert cfg.model.test_cfg == dict(mode='slide', crop_size=(512, 512), stride=(341, 341))
    assert cfg.model.data_preprocessor.mean == cfg.model.data_preprocessor.std == [127.5] * 3
    kinds = [step.type for step in cfg.train_pipeline]
    assert kinds[2:6] == ['RandomResize', 'RandomCrop', 'RandomFlip', 'PhotoMetricDistortion']
    assert (cfg.train_pipeline[2].scale, cfg.train_pipeline[2].ratio_range) == ((2048, 512), (0.5, 2.0))


@pytest.mark.parametrize('path', [base for base in BASES if base.parent.name == 'methods'], ids=name)
def test_a_base_of_a_method_is_a_word_and_short(path):
    """Leaves need not name it: ``--method`` does."""
    assert path.stem in known_methods() and 'method' in read_method(path.stem)
    assert sum(bool(line.strip()) for line in path.read_text().splitlines() if not line.startswith('#')) <= 6


@pytest.mark.parametrize('path', [base for base in BASES if base.parent.name != 'methods'], ids=name)
def test_every_base_is_used(path):
    by_leaf = any(f'{path.parent.name}/{path.name}' in leaf.read_text() for leaf in LEAVES)
    assert by_leaf or any(f"'./{path.name}'" in base.read_text() for base in path.parent.glob('*.py'))
