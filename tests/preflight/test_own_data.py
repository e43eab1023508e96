"""Configs filled from data of one's own: what is found, what is held out, what is refused."""

import shutil
from argparse import Namespace
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from own_worlds import NAMES, draw_class_folders, draw_clip_lists, draw_clips, draw_masks

from mmdyt import compat, preflight
from mmdyt.datasets.held_out import draw
from mmdyt.preflight.labels import check_labels

compat.install()


def load(task: str, root: Path | None, **options) -> Config:
    given = {f'own.{name}': value for name, value in options.items() if not name.startswith('model')}
    given |= {name.replace('__', '.'): value for name, value in options.items() if name.startswith('model')}
    given |= {} if root is None else {'own.root': str(root)}
    args = dict(config=str(ROOT / f'configs/own/{task}.py'), cfg_options=given, work_dir=None, launcher='none')
    return preflight.load_config(Namespace(**args, local_rank=0))


def samples(cfg: Config, split: str) -> list[tuple[str, int]]:
    """Files, relative to the root, and labels."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        data = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
        infos = [data.get_data_info(i) for i in range(len(data))]
    root = Path(cfg.train_dataloader.dataset.data_root)
    files = [str(Path(info.get('img_path') or info['filename']).relative_to(root)) for info in infos]
    return [(file, info.get('gt_label', info.get('label'))) for file, info in zip(files, infos, strict=True)]


WORLDS = [
    ('classification', draw_class_folders, 12, 6),
    ('segmentation', draw_masks, 6, 2),
    ('video', draw_clips, 9, 3),
    ('video', draw_clip_lists, 9, 3),
]
IDS = [draw.__name__ for _, draw, *_ in WORLDS]


@pytest.mark.parametrize(('task', 'world', 'train', 'val'), WORLDS, ids=IDS)
def test_classes_and_samples_are_those_of_the_folders(task, world, train, val, tmp_path):
    cfg = load(task, world(tmp_path), size=32)
    assert 'own' not in cfg and "'own." not in cfg.pretty_text
    dataset = cfg.train_dataloader.dataset
    assert tuple(dataset.metainfo.classes) == NAMES
    head = cfg.model.get('head') or cfg.model.get('cls_head') or cfg.model.decode_head
    assert (head.num_classes, head.in_channels) == (3, 192)  # the width of deit-tiny
    assert (len(samples(cfg, 'train')), len(samples(cfg, 'val'))) == (train, val)
    assert all(label is None or NAMES[label] in file for file, label in samples(cfg, 'train') + samples(cfg, 'val'))


@pytest.mark.parametrize(('task', 'world'), [('classification', draw_class_folders), ('segmentation', draw_masks),
                                             ('video', draw_clips)], ids=['images', 'masks', 'clips'])  # fmt: skip
def test_a_share_is_held_out_of_each_class(task, world, tmp_path):
    """Whole, the same for a seed wherever the root lies, another one for another seed."""
    found = {}
    for name, seed in (('one', 0), ('two', 0), ('three', 1)):
        cfg = load(task, world(tmp_path / name, (('', 8),)), val=0.25, seed=seed)
        train, val = samples(cfg, 'train'), samples(cfg, 'val')
        assert not set(train) & set(val) and len(train) == 3 * len(val)
        for label in {label for _, label in val}:
            assert [other for _, other in val].count(label) == 2  # of 8
        found[name] = val
    assert found['one'] == found['two'] != found['three']


def test_who_is_held_out_does_not_depend_on_order_and_is_never_all():
    clips = [dict(filename=f'/data/{i}.mp4', label=i % 2) for i in range(10)]
    drawn = {clips[i]['filename'] for i in draw(clips, '/data', 0.4, 0)}
    turned = clips[::-1]
    assert drawn == {turned[i]['filename'] for i in draw(turned, '/data', 0.4, 0)} and len(drawn) == 4
    assert len(draw(clips[:2], '/data', 0.9, 0)) == 0 and len(draw(clips[:4], '/data', 0.9, 0)) == 2


def test_widths_and_sizes_follow_the_options(tmp_path):
    cfg = load('segmentation', draw_masks(tmp_path), size=64, ignore_zero=True, model__backbone__arch='large')
    head, backbone = cfg.model.decode_head, cfg.model.backbone
    assert (head.in_channels, head.channels, backbone.out_indices) == (1024, 1024, [23])
    assert backbone.img_size == cfg.model.test_cfg.crop_size == cfg.model.data_preprocessor.size == (64, 64)
    assert cfg.model.test_cfg.stride == (42, 42)
    assert cfg.train_dataloader.dataset.reduce_zero_label is cfg.train_pipeline[1].reduce_zero_label is True
    assert cfg.train_dataloader.dataset.pipeline[3].crop_size == (64, 64)


def test_what_the_user_sets_is_kept(tmp_path):
    cfg = load('classification', draw_class_folders(tmp_path), model__head__num_classes=7)
    assert cfg.model.head.num_classes == 7


def test_configs_without_own_are_left_alone():
    args = dict(config=str(ROOT / 'configs/dyt/vitti_cifar100_1k.py'), cfg_options=None, work_dir=None)
    cfg = preflight.load_config(Namespace(**args, launcher='none', local_rank=0))
    assert cfg.model.head.num_classes == 100


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


FOLDERS, MASKS, CLIPS, LISTS = ((task, world) for task, world, *_ in WORLDS)
CASES = {
    'no root': (*FOLDERS, None, dict(root=None), 'own.root must name the folder'),
    'lost root': (*FOLDERS, None, dict(root='nowhere'), 'own.root must name an existing'),
    'size': (*FOLDERS, None, dict(size=40), 'own.size must be a multiple of 16'),
    'share': (*FOLDERS, None, dict(val=20), r'own.val must lie in \(0, 1\)'),
    'typo': (*FOLDERS, None, dict(sise=32), 'no option sise. Did you mean size'),
    'both': (*FOLDERS, None, dict(val=0.2), 'own.val must be left out where'),
    'no class': (*FOLDERS, lambda root: empty(root / 'train'), {}, 'a folder of each class'),
    'empty class': (*FOLDERS, lambda root: empty(root / 'train/red'), {}, r'train/red must hold at least 1'),
    'no val': (*FOLDERS, lambda root: shutil.rmtree(root / 'val'), {}, r'must hold val.*own.val=0.2'),
    'no train': (*CLIPS, lambda root: shutil.rmtree(root / 'train'), {}, r'got no train.*own.val=0.2'),
    'no names': (*MASKS, lambda root: (root / 'classes.txt').unlink(), {}, 'must hold classes.txt'),
    'twice': (*MASKS, lambda root: (root / 'classes.txt').write_text('a\nb\na\n'), {}, r"\['a'\] twice"),
    'no masks': (*MASKS, lambda root: shutil.rmtree(root / 'masks'), {}, 'a folder masks or annotations'),
    'no mask': (*MASKS, lambda root: (root / 'masks/val/1.png').unlink(), {}, 'none for 1, first 1'),
    'no image': (*MASKS, lambda root: (root / 'images/val/0.jpg').unlink(), {}, 'an image for each mask.*first 0'),
    'endings': (*MASKS, lambda root: (root / 'images/train/x.png').touch(), {}, '6 of .jpg and 1 of .png'),
    'empty clip': (*CLIPS, lambda root: (root / 'val/red/0.mp4').write_bytes(b''), {}, '1 of 3, first .*val/red/0.mp4'),
    'unlisted': (*LISTS, lambda root: (root / 'classes.txt').write_text('a\nb\nc\nd\n'), {}, r"got none of \['d'\]"),
}  # fmt: skip


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_what_cannot_be_is_refused_by_name(case, tmp_path):
    task, world, spoil, options, message = case
    options = dict(options)
    world(tmp_path)
    if spoil:
        spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError, KeyError), match=message):
        load(task, options.pop('root', tmp_path), **options)


def high_mask(root: Path) -> None:
    cv2.imwrite(str(root / 'masks/train/0.png'), np.full((48, 64), 3, np.uint8))


@pytest.mark.parametrize(
    ('task', 'world', 'spoil', 'message'),
    [
        ('segmentation', draw_masks, high_mask, r'labels in \[0, 3\).*got \[3\] in .*masks/train/0.png'),
        ('segmentation', draw_masks, lambda root: (root / 'images/train/0.jpg').write_bytes(b'x'), '0.jpg'),
        ('classification', draw_class_folders, lambda root: (root / 'train/red/0.png').write_bytes(b'x'), '0.png'),
        ('classification', draw_class_folders, lambda root: shutil.rmtree(root / 'val/red'), 'class folders'),
    ],
    ids=['high label', 'broken image', 'broken class image', 'other classes'],
)
def test_bad_samples_are_named_before_work_starts(task, world, spoil, message, tmp_path):
    spoil(world(tmp_path))
    cfg = load(task, tmp_path, size=32)
    with DefaultScope.overwrite_default_scope(cfg.default_scope), pytest.raises(ValueError, match=message):
        check_labels(cfg, ('train', 'val'))
