"""tools/demo.py and tools/demo_data.py: pictures and clips are exact and repeatable, the configs fit, the demo runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, load_tool
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope

SCALE = '0.02'  # 80 + 20 pictures to classify, 16 + 2 to segment, 5 tuning steps, 16 + 4 clips
data = load_tool('demo_data')


def files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob('*.*'))
        if path.suffix in ('.png', '.avi')
    }


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
    assert len(first) == 80 + 20 + 2 * (16 + 2) + 16 + 4
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


@pytest.mark.parametrize(('direction', 'opposite'), [('right', 'left'), ('down', 'up')])
def test_the_opposite_direction_is_the_same_clip_backwards(direction, opposite):
    for seed in range(5):
        one, other = (data.draw_clip(np.random.default_rng(seed), name) for name in (direction, opposite))
        assert one.shape == (data.FRAMES, data.CLIP_SIZE, data.CLIP_SIZE, 3)
        assert (one == other[::-1]).all() and (one != other).any()


@pytest.mark.parametrize(
    ('direction', 'axis', 'sign'), [('right', 1, 1), ('left', 1, -1), ('down', 0, 1), ('up', 0, -1)]
)
def test_the_shape_moves_where_the_class_says(direction, axis, sign, monkeypatch):
    monkeypatch.setattr(data, 'finish', lambda rng, image: image)
    for seed in range(5):
        frames = data.draw_clip(np.random.default_rng(seed), direction).mean(-1)
        ground = frames.min(0)
        centres = [np.argwhere(frame > ground + 5).mean(0) for frame in frames]
        assert (np.diff(centres, axis=0)[:, axis] * sign > 1).all()


def test_clips_are_read_as_drawn_and_come_in_pairs(root):
    cfg = load_config('clips_temporal.py', root)
    assert cfg.classes == data.DIRECTIONS and cfg.num_frames == data.FRAMES
    assert cfg.model.backbone.img_size == data.CLIP_SIZE
    for split, count in (('train', 16), ('val', 4)):
        dataset = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
        samples = [dataset[i] for i in range(len(dataset))]
        labels = [sample['data_samples'].gt_label.item() for sample in samples]
        assert np.bincount(labels).tolist() == [count // 4] * 4
        for i, (sample, label) in enumerate(zip(samples, labels, strict=True)):
            rng = np.random.default_rng([0, 2, split == 'val', i // 2])
            frames = data.draw_clip(rng, data.DIRECTIONS[label])[..., ::-1]  # red first
            assert (sample['inputs'][0].permute(1, 2, 3, 0).numpy() == frames).all()
        for one, other in zip(samples[::2], samples[1::2], strict=True):
            assert (one['inputs'] == other['inputs'].flip(2)).all()


def test_the_two_video_models_are_one_option_apart(root):
    blind, temporal = (load_config(f'clips_{name}.py', root).to_dict() for name in ('order_blind', 'temporal'))
    assert temporal['model']['neck']['aggregator'].pop('temporal_positions') == data.FRAMES
    assert temporal.pop('work_dir') != blind.pop('work_dir')
    assert temporal == blind


@pytest.mark.parametrize('name', ['order_blind', 'temporal'])
def test_only_the_temporal_model_can_tell_a_clip_from_its_reverse(name, root):
    cfg = load_config(f'clips_{name}.py', root)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model | dict(_scope_='mmaction')).eval()
    if name == 'temporal':
        torch.nn.init.normal_(model.neck.aggregator.temporal_positions)
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    batch = [dataset[i] for i in range(len(dataset))]
    with torch.no_grad():
        scores = torch.stack([x.pred_score for x in model.test_step(pseudo_collate(batch))])
    blind = torch.allclose(scores[::2], scores[1::2], atol=1e-6)
    assert blind == (name == 'order_blind')


@pytest.mark.parametrize(
    ('name', 'scope', 'unused'), [('dyt_shapes', 'mmseg', {'ln1', 'ln2'}), ('clips_temporal', 'mmaction', {'ln2'})]
)
def test_the_tuned_model_takes_the_pretrained_base(name, scope, unused, root):
    base, tuned = (load_config(f'{leaf}.py', root) for leaf in ('pretrain_shapes', name))
    plain = MODELS.build(base.model | dict(_scope_='mmpretrain')).backbone.state_dict()
    dynamic = MODELS.build(tuned.model | dict(_scope_=scope)).backbone.state_dict()
    assert {name for name in dynamic if name not in plain and 'dynamic' not in name} == set()
    assert {name for name in plain if name not in dynamic} == {
        f'{norm}.{p}' for norm in unused for p in ('weight', 'bias')
    }
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


def test_missing_packages_are_named_before_any_work(monkeypatch, tmp_path):
    demo = load_tool('demo')
    monkeypatch.setattr(demo, 'find_spec', lambda name: None if name == 'decord' else object())
    with pytest.raises(SystemExit, match=r'must find decord: the extra `video`'):
        demo.main(['--work-dir', str(tmp_path / 'new')])
    assert not (tmp_path / 'new').exists()


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
    assert len(re.findall(r'^\$ MMDYT_DEMO=.* mmdyt (demo_data|train|test) ', result.stdout, re.M)) == 6
    report = result.stdout[result.stdout.index('mIoU    ') :]
    numbers = {line.split('  ')[0]: re.findall(r'[\d.]*\d', line) for line in report.splitlines()}
    dense, skipping = (float(numbers['GMACs per image'][i]) for i in (1, 0))
    assert 0 < skipping < dense
    assert float(numbers['mIoU'][1]) == pytest.approx(
        load_tool('demo').one_class_miou(work_dir / 'data/seg/annotations/validation'), abs=0.1
    )
    assert 0 <= float(numbers['Activation rate'][0]) <= 1 and float(numbers['Activation rate'][1]) == 0.5
    assert '0.019' in numbers['Parameters (M)']  # adapters: 6 layers of 2 x 96 x 16 + 16 + 96
    temporal, blind, chance, ceiling = map(float, numbers['Clips, direction'])
    assert 0 <= temporal <= 100 and 0 <= blind <= ceiling == 50 and chance == 25
    skipping, dense = map(float, numbers['GMACs per clip'][:2])
    assert min(skipping, dense) > 0
    assert all(0 <= float(rate) <= 1 for rate in numbers['Rate on clips'])
    picture = cv2.imread(str(work_dir / 'demo.png'))
    assert picture.shape[1] > 4 * 160 and picture.shape[0] > 2 * 160 and picture.std() > 20
