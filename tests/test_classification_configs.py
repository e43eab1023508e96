"""The classification recipes: VTAB-1K and the full image sets. Numbers are those of arXiv 2403.11808, appendix."""

import ast
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import import_modules_from_strings

from mmdyt import compat, preflight
from mmdyt.core.tuning import count_parameters
from mmdyt.preflight.datasets import check_data

compat.install()

from mmengine.registry import DATASETS, METRICS, TRANSFORMS  # noqa: E402

ROOT = Path(__file__).parents[1]
# arXiv 2403.11808, appendix: the 19 tasks of VTAB-1K and their classes
TASKS = dict(
    cifar=100, caltech101=102, dtd=47, oxford_flowers102=102, oxford_iiit_pet=37, svhn=10, sun397=397,
    patch_camelyon=2, eurosat=10, resisc45=45, diabetic_retinopathy=5,
    clevr_count=8, clevr_dist=6, dmlab=6, kitti=4, dsprites_loc=16, dsprites_ori=16, smallnorb_azi=18, smallnorb_ele=9,
)  # fmt: skip
IMAGE_SETS = dict(
    cifar100=('CIFAR100', 100, 'train', '91.37'),
    svhn=('mmdyt.SVHN', 10, 'train', '97.08'),
    food101=('Food101', 101, 'train', '90.32'),
    aircraft=('FGVCAircraft', 100, 'trainval', '78.92'),
    pets=('OxfordIIITPet', 37, 'trainval', '94.45'),
    cars=('StanfordCars', 196, 'train', '87.80'),
)


def load(name: str) -> Config:
    cfg = Config.fromfile(ROOT / f'configs/{name}.py', import_custom_modules=False)
    import_modules_from_strings(**cfg.custom_imports)
    return cfg


def build_model(name: str) -> torch.nn.Module:
    cfg = load(name)
    with DefaultScope.overwrite_default_scope('mmpretrain'), torch.device('meta'):
        return MODELS.build(cfg.model)


def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse((ROOT / f'configs/{name}.py').read_text()))


def schedule(cfg: Config) -> tuple:
    """Optimizer, learning rate, weight decay, batch, epochs, epochs of warm-up, decay."""
    optimizer, (warm_up, decay) = cfg.optim_wrapper.optimizer, cfg.param_scheduler
    assert warm_up.type == 'LinearLR' and decay.begin == warm_up.end and decay.end == cfg.train_cfg.max_epochs
    assert warm_up.get('by_epoch', True) and warm_up.convert_to_iter_based and decay.eta_min == 0
    batch = cfg.train_dataloader.batch_size
    assert batch == cfg.auto_scale_lr.base_batch_size
    numbers = optimizer.weight_decay, batch, cfg.train_cfg.max_epochs, warm_up.end
    return optimizer.type, optimizer.lr, *numbers, decay.type


def transforms(pipeline: list) -> list[str]:
    return [step.type for step in pipeline]


# VTAB-1K


@pytest.fixture
def no_task(monkeypatch):
    for name in ('VTAB_TASK', 'VTAB_ROOT'):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize('task', TASKS)
def test_every_vtab_task_is_one_environment_variable_away(monkeypatch, no_task, task):
    monkeypatch.setenv('VTAB_TASK', task)
    cfg = load('dyt/vitb_vtab1k')
    assert cfg.model.head.num_classes == TASKS[task]
    for loop in ('train', 'val', 'test'):
        assert cfg[f'{loop}_dataloader'].dataset.data_root == f'data/vtab-1k/{task}'


def test_vtab_has_19_tasks_in_three_groups(no_task):
    groups = load('dyt/vitb_vtab1k').vtab_groups
    assert {name: len(group) for name, group in groups.items()} == dict(natural=7, specialized=4, structured=8)
    assert {task: count for group in groups.values() for task, count in group.items()} == TASKS


def test_unknown_vtab_task_is_refused_with_the_known_ones(monkeypatch, capsys):
    monkeypatch.setenv('VTAB_TASK', 'foo')
    with pytest.raises(SystemExit), preflight.clean_exit():
        load('dyt/vitb_vtab1k')
    said = f"error: VTAB_TASK must be one of {list(TASKS)}, got 'foo'. MMDYT_TRACEBACK=1 shows where it arose.\n"
    assert capsys.readouterr().err == said


def test_vtab_root(monkeypatch):
    monkeypatch.setenv('VTAB_ROOT', '/somewhere')
    monkeypatch.setenv('VTAB_TASK', 'dtd')
    assert load('dyt/vitb_vtab1k').train_dataloader.dataset.data_root == '/somewhere/dtd'


def test_vtab_is_the_papers_recipe(no_task):
    cfg = load('dyt/vitb_vtab1k')
    assert schedule(cfg) == ('AdamW', 1e-3, 1e-4, 64, 100, 10, 'CosineAnnealingLR')
    adapter = cfg.model.backbone.adapter
    assert (adapter.bottleneck, adapter.scale, cfg.model.target_rate) == (8, 1.0, 0.5)
    assert cfg.model.data_preprocessor.normalization == 'half'
    lists = {loop: cfg[f'{loop}_dataloader'].dataset.ann_file for loop in ('train', 'val', 'test')}
    assert lists == dict(train='train800val200.txt', val='test.txt', test='test.txt')
    for loop in lists:
        dataset = cfg[f'{loop}_dataloader'].dataset
        assert dataset.type == 'CustomDataset'
        assert transforms(dataset.pipeline) == ['LoadImageFromFile', 'Resize', 'PackInputs']  # no augmentation
        resize = dataset.pipeline[1]
        assert (resize.scale, resize.interpolation, resize.backend) == ((224, 224), 'bicubic', 'pillow')
    assert cfg.val_evaluator == cfg.test_evaluator == dict(type='Accuracy', topk=(1,))


@pytest.mark.parametrize(
    ('name', 'rate', 'number'),
    [('dyt/vitb_vtab1k', 0.5, '77.14'), ('dyt/vitb_r07_vtab1k', 0.7, '77.57'), ('dyt/vitb_r09_vtab1k', 0.9, '77.30')],
)
def test_vtab_rates(name, rate, number):
    assert load(name).model.target_rate == rate
    assert f'VTAB table: {number}' in docstring(name)


def test_vtab_variants():
    assert load('dyt/vitb_d64_vtab1k').model.backbone.adapter == dict(type='mmdyt.Adapter', bottleneck=64, scale=1.0)
    assert load('dyt/vitb_sample_level_vtab1k').model.backbone.dispatcher.type == 'mmdyt.SampleDispatcher'
    dispatcher = load('dyt/vitb_random_vtab1k').model.backbone.dispatcher
    assert dispatcher == dict(type='mmdyt.RandomDispatcher', rate=0.5)
    large = load('dyt/vitl_vtab1k').model
    assert (large.backbone.arch, large.head.in_channels) == ('large', 1024)
    assert large.backbone.init_cfg.checkpoint == 'pretrain/vit_large_patch16_224_in21k.pth'


# full image sets


@pytest.mark.parametrize('name', IMAGE_SETS)
def test_image_sets_are_the_papers_recipe(name):
    cfg = load(f'dyt/vitb_{name}')
    assert schedule(cfg) == ('AdamW', 4e-3, 0.01, 1024, 100, 20, 'CosineAnnealingLR')  # 1e-3 for every 256 images
    assert cfg.model.backbone.get('drop_path_rate', 0) == 0
    assert cfg.model.backbone.adapter == dict(type='mmdyt.Adapter', bottleneck=64, scale=0.1)
    assert cfg.model.data_preprocessor.normalization == 'half'
    train, test = (cfg[f'{loop}_dataloader'].dataset.pipeline for loop in ('train', 'test'))
    assert transforms(train)[-3:] == ['RandomResizedCrop', 'RandomFlip', 'PackInputs']
    assert (train[-3].scale, train[-3].interpolation, train[-2].prob) == (224, 'bicubic', 0.5)
    assert transforms(test)[-3:] == ['ResizeEdge', 'CenterCrop', 'PackInputs']
    assert (test[-3].scale, test[-3].edge, test[-3].interpolation) == (256, 'short', 'bicubic')
    assert test[-2].crop_size == 224


@pytest.mark.parametrize('name', IMAGE_SETS)
def test_image_sets(name):
    kind, classes, split, number = IMAGE_SETS[name]
    cfg = load(f'dyt/vitb_{name}')
    datasets = {loop: cfg[f'{loop}_dataloader'].dataset for loop in ('train', 'val', 'test')}
    assert {dataset.type for dataset in datasets.values()} == {kind}
    assert [dataset.split for dataset in datasets.values()] == [split, 'test', 'test']
    with DefaultScope.overwrite_default_scope('mmpretrain'), DATASETS.switch_scope_and_registry(None) as registry:
        assert cfg.model.head.num_classes == classes == len(registry.get(kind).METAINFO['classes'])
    assert f'image classification table: {number}' in docstring(f'dyt/vitb_{name}')


@pytest.mark.parametrize('name', IMAGE_SETS)
def test_pipelines_give_224_pixels_of_the_same_channel_order(name, tmp_path):
    cfg = load(f'dyt/vitb_{name}')
    red = np.zeros((40, 60, 3), np.uint8)
    red[..., 2] = 255  # BGR, as files are read
    cv2.imwrite(str(tmp_path / 'red.png'), red)
    for loop in ('train', 'test'):
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            steps = [TRANSFORMS.build(step) for step in cfg[f'{loop}_dataloader'].dataset.pipeline]
        arrays = name in ('cifar100', 'svhn')  # mmpretrain's CIFAR100 holds RGB arrays
        sample = dict(img=red[..., ::-1].copy()) if arrays else dict(img_path=str(tmp_path / 'red.png'))
        for step in steps:
            sample = step(sample)
        assert sample['inputs'].shape == (3, 224, 224)
        assert sample['inputs'].flatten(1).float().mean(dim=1).tolist() == [0, 0, 255]


@pytest.mark.parametrize('name', IMAGE_SETS)
def test_aircraft_and_pets_count_per_class(name):
    cfg = load(f'dyt/vitb_{name}')
    kinds = ['SingleLabelMetric', 'Accuracy'] if name in ('aircraft', 'pets') else ['Accuracy']
    for loop in ('val', 'test'):
        metrics = cfg[f'{loop}_evaluator']
        assert [metric.type for metric in metrics] == kinds
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            built = [METRICS.build(metric) for metric in metrics]
    if len(built) == 2:
        # class 0: 3 of 3 right, class 1: 0 of 1
        labels = [(0, 0), (0, 0), (0, 0), (0, 1)]
        scores = torch.eye(2)
        samples = [dict(pred_score=scores[p], gt_label=torch.tensor([t])) for p, t in labels]
        for metric in built:
            metric.process(None, samples)
        assert built[0].evaluate(4) == {'single-label/recall': 50.0}
        assert built[1].evaluate(4) == {'accuracy/top1': 75.0}


@pytest.mark.parametrize('name', IMAGE_SETS)
def test_the_check_before_training_accepts_a_folder_and_refuses_none(name, tmp_path, monkeypatch):
    dataset = ConfigDict(load(f'dyt/vitb_{name}').train_dataloader.dataset)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        check_data(ConfigDict(dataset, data_root=str(tmp_path)), 'set')
        missing = ConfigDict(dataset, data_root=str(tmp_path / 'no'))
        if name == 'cifar100':
            check_data(missing, 'set')  # mmpretrain downloads it
        else:
            with pytest.raises(FileNotFoundError, match='set.data_root must name an existing folder'):
                check_data(missing, 'set')


@pytest.mark.parametrize(
    ('name', 'dispatch', 'rate', 'number'),
    [('attn', 'attn', 0.5, '84.58'), ('attn_mlp', 'attn_mlp', 0.7, '90.03'), ('layer', 'layer', 0.7, '89.38')],
)
def test_dispatch_variants(name, dispatch, rate, number):
    model = load(f'dyt/vitb_{name}_cifar100').model
    assert (model.backbone.dispatch, model.target_rate) == (dispatch, rate)
    assert docstring(f'dyt/vitb_{name}_cifar100').splitlines()[0].endswith(f': {number}.')


def test_moe():
    adapter = load('dyt/vitb_moe_cifar100').model.backbone.adapter
    assert adapter == dict(type='mmdyt.MoEAdapter', num_experts=4, bottleneck=64, scale=0.1)


# baselines: the paper's "Params" are millions of tuned parameters without dispatchers and head

BASE = 85_798_656  # ViT-B/16 at 224 x 224, without head


@pytest.mark.parametrize('data', ['cifar100', 'vtab1k'])
def test_baselines_tune_what_they_say(data, no_task):
    head = 768 * 100 + 100
    adapters = dict(cifar100=1_189_632, vtab1k=156_768)[data]  # d = 64, d = 8
    tuned = {
        kind: count_parameters(build_model(f'baselines/vitb_{kind}_{data}'))['tuned']
        for kind in ('linear', 'adapter', 'full')
    }
    assert tuned == dict(linear=head, adapter=head + adapters, full=head + BASE)
    dynamic = count_parameters(build_model(f'dyt/vitb_{data}'))
    assert dynamic['tuned'] == head + adapters + 9_228
    assert dynamic['frozen'] == BASE


def test_dynamic_full_tunes_everything_and_keeps_adapters_and_dispatchers():
    counts = count_parameters(build_model('dyt/vitb_full_cifar100'))
    assert counts['frozen'] == 0 and counts['tuned'] == BASE + 1_189_632 + 9_228 + 768 * 100 + 100


@pytest.mark.parametrize(
    ('name', 'rate'),
    [('baselines/vitb_full_vtab1k', 1e-4), ('baselines/vitb_full_cifar100', 4e-4), ('dyt/vitb_full_cifar100', 4e-4)],
)
def test_full_tuning_learns_at_a_tenth_of_the_rate(name, rate):
    assert load(name).optim_wrapper.optimizer.lr == pytest.approx(rate)


@pytest.mark.parametrize(
    ('name', 'numbers'),
    [('vtab1k', ('68.96', '57.64', '74.75')), ('cifar100', ('90.91', '85.87', '92.03'))],
)
def test_baselines_name_the_papers_numbers(name, numbers):
    for kind, number in zip(('full', 'linear', 'adapter'), numbers, strict=True):
        assert f'table: {number}.' in docstring(f'baselines/vitb_{kind}_{name}').splitlines()[0]
