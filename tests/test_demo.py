"""tools/demo.py and tools/demo_data.py: the pictures are exact and repeatable, the configs fit, the demo runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT, load_tool
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope

SCALE = '0.02'  # 80 + 20 pictures to classify, 16 + 2 to segment, 5 tuning steps
data = load_tool('demo_data')


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob('*.png'))}


@pytest.fixture(scope='module')
def root(tmp_path_factory) -> Path:
    """A demo folder with data, nothing else."""
    root = tmp_path_factory.mktemp('demo')
    data.main([str(root / 'data'), '--scale', SCALE])
    return root


def load_config(name: str, root: Path) -> Config:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MMDYT_DEMO', str(root))
        cfg = Config.fromfile(ROOT / 'configs/demo' / name)
    init_default_scope(cfg.default_scope)
    return cfg


def test_data_repeats_itself_for_a_seed(root, tmp_path):
    data.main([str(tmp_path / 'same'), '--scale', SCALE])
    data.main([str(tmp_path / 'other'), '--scale', SCALE, '--seed', '1'])
    first, same, other = files(root / 'data'), files(tmp_path / 'same'), files(tmp_path / 'other')
    assert len(first) == 80 + 20 + 2 * (16 + 2)
    assert first == same
    assert first.keys() == other.keys() and all(first[name] != other[name] for name in first)
    assert len(set(first.values())) == len(first)  # nor does validation repeat training


@pytest.mark.parametrize('options', [['--seed', '-1'], ['--scale', '0'], ['--scale', '2']])
def test_data_refuses_bad_options(options, tmp_path, capsys):
    with pytest.raises(SystemExit):
        data.main([str(tmp_path), *options])
    assert f'{options[0]} must' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('shape', 'area'),
    [  # from geometry
        ('disc', np.pi * 0.9**2),
        ('ring', np.pi * (0.9**2 - 0.5**2)),
        ('triangle', 3 * 3**0.5 * 0.5**2),  # equilateral, inner radius 0.5
        ('cross', 2 * 1.9 * 0.56 - 0.56**2),
    ],
)
def test_shapes_have_their_area(shape, area):
    u, v = (axis / 100 for axis in data.rotated_grid(240, (120, 120), 0.3))
    mask = data.shape_mask(shape, u, v)
    assert mask.sum() / 100**2 == pytest.approx(area, rel=0.01)
    assert np.hypot(u, v)[mask].max() <= 1


def test_shapes_and_textures_differ():
    u, v = (axis / 30 for axis in data.rotated_grid(64, (32, 32), 0))
    assert len({data.shape_mask(name, u, v).tobytes() for name in data.SHAPES}) == len(data.SHAPES)
    u, v = (axis / 8 for axis in data.rotated_grid(64, (3, 5), 0))
    assert len({data.texture_mask(name, u, v).tobytes() for name in data.TEXTURES}) == len(data.TEXTURES)


def test_a_shape_changes_exactly_its_mask():
    for seed, texture in enumerate(data.TEXTURES):
        ground = np.full((80, 80, 3), 45.0)
        image = ground.copy()
        mask = data.draw_shape(np.random.default_rng(seed), image, 'ring', texture, 20)
        assert ((image != ground).any(-1) == mask).all() and mask.any()


def test_annotations_are_exact(monkeypatch):
    monkeypatch.setattr(data, 'finish', lambda rng, image: image)
    seen = set()
    for seed in range(20):
        image, labels = data.draw_scene(np.random.default_rng(seed))
        ground = data.draw_ground(np.random.default_rng(seed), data.SEG_SIZE)
        assert ((image == ground).all(-1) == (labels == 1)).all()
        assert len(np.unique(image[labels == 0], axis=0)) == 1  # the line of clutter has one colour
        seen |= set(np.unique(labels).tolist())
    assert seen == set(range(len(data.TEXTURES) + 2))


def test_segmentation_data_fits_its_config(root):
    cfg = load_config('dyt_shapes.py', root)
    assert cfg.metainfo.classes == ('background', *data.TEXTURES)
    assert tuple(cfg.crop_size) == (data.SEG_SIZE, data.SEG_SIZE)
    for split, count in (('train', 16), ('val', 2)):
        dataset = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
        assert len(dataset) == count
        for i in range(count):
            sample = dataset[i]
            assert sample['inputs'].shape == (3, data.SEG_SIZE, data.SEG_SIZE)
            assert set(sample['data_samples'].gt_sem_seg.data.unique().tolist()) <= {0, 1, 2, 3, 4, 5, 255}
    folder, name = 'data/seg/annotations/validation', '00000.png'
    labels = cv2.imread(str(root / folder / name), cv2.IMREAD_UNCHANGED)
    assert (dataset[0]['data_samples'].gt_sem_seg.data[0].numpy() == labels - np.uint8(1)).all()


def test_classification_data_fits_its_config(root):
    cfg = load_config('pretrain_shapes.py', root)
    classes = sorted(f'{shape}_{texture}' for shape in data.SHAPES for texture in data.TEXTURES)
    for split, count in (('train', 80), ('val', 20)):
        dataset = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
        assert len(dataset) == count and sorted(dataset.CLASSES) == classes and cfg.num_classes == len(classes)
        assert dataset[0]['inputs'].shape == (3, data.CLS_SIZE, data.CLS_SIZE)
    assert cfg.model.backbone.img_size == data.CLS_SIZE


def test_the_tuned_model_takes_the_pretrained_base(root):
    base, tuned = (load_config(name, root) for name in ('pretrain_shapes.py', 'dyt_shapes.py'))
    plain = MODELS.build(base.model | dict(_scope_='mmpretrain')).backbone.state_dict()
    dynamic = MODELS.build(tuned.model | dict(_scope_='mmseg')).backbone.state_dict()
    assert {name for name in dynamic if name not in plain and 'dynamic' not in name} == set()
    assert {name for name in plain if name not in dynamic} == {'ln1.weight', 'ln1.bias', 'ln2.weight', 'ln2.bias'}
    expected = Path(base.work_dir) / f'epoch_{base.train_cfg.max_epochs}.pth'
    assert tuned.model.backbone.init_cfg.checkpoint == str(expected)


def test_start_afresh_empties_its_own_folder_only(tmp_path):
    demo = load_tool('demo')
    own, foreign = tmp_path / 'own', tmp_path / 'foreign'
    for _ in range(2):
        demo.start_afresh(own)
        assert [path.name for path in own.iterdir()] == [demo.STAMP]
        (own / 'left over').touch()
    foreign.mkdir()
    (foreign / 'thesis.tex').touch()
    for folder in (foreign, foreign / 'thesis.tex'):
        with pytest.raises(SystemExit, match='--work-dir must be new, empty or from an earlier demo'):
            demo.start_afresh(folder)
    assert (foreign / 'thesis.tex').exists()


def test_one_class_miou(tmp_path):
    demo = load_tool('demo')
    for i, labels in enumerate(([[0, 0, 1, 1]], [[1, 2, 3, 1]])):
        cv2.imwrite(str(tmp_path / f'{i}.png'), np.array(labels, np.uint8))
    # class 1 everywhere: 4 of 6 labelled pixels right, IoU 4/6 and 0 and 0
    assert demo.one_class_miou(tmp_path) == pytest.approx(100 * (4 / 6) / 3)


def test_demo_runs(tmp_path):
    work_dir = tmp_path / 'demo folder'
    result = subprocess.run(
        [sys.executable, ROOT / 'tools/demo.py', '--work-dir', work_dir, '--scale', SCALE],
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert len(re.findall(r'^\$ MMDYT_DEMO=.* python tools/', result.stdout, re.M)) == 4
    report = result.stdout[result.stdout.index('mIoU    ') :]
    numbers = {line.split('  ')[0]: re.findall(r'[\d.]*\d', line) for line in report.splitlines()}
    dense, skipping = (float(numbers['GMACs per image'][i]) for i in (1, 0))
    assert 0 < skipping < dense
    assert float(numbers['mIoU'][1]) == pytest.approx(
        load_tool('demo').one_class_miou(work_dir / 'data/seg/annotations/validation'), abs=0.1
    )
    assert 0 <= float(numbers['Activation rate'][0]) <= 1 and float(numbers['Activation rate'][1]) == 0.5
    assert '0.019' in numbers['Parameters (M)']  # adapters: 6 layers of 2 x 96 x 16 + 16 + 96
    picture = cv2.imread(str(work_dir / 'demo.png'))
    assert picture.shape[1] > 4 * 160 and picture.shape[0] > 2 * 160 and picture.std() > 20
