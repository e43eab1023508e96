"""Labels that mean different things in two splits, or do not fit the heads, are refused before work starts."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmdyt import compat

compat.install()

import mmaction.datasets  # noqa: E402, F401
import mmpretrain.datasets  # noqa: E402, F401
import mmseg.datasets  # noqa: E402, F401
import mmseg.models  # noqa: E402, F401
from mmengine.registry import DefaultScope  # noqa: E402

from mmdyt.preflight.labels import check_labels, model_heads  # noqa: E402

NAMES = ['cat', 'dog', 'eel']
IMAGE = cv2.imencode('.png', np.zeros((8, 12, 3), np.uint8))[1].tobytes()
LOAD, LOAD_MASK = dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')
REDUCED = dict(reduce_zero_label=True)
LOAD_REDUCED = LOAD_MASK | REDUCED
BINARY = dict(classes=('no', 'yes'))
EDGES = dict(auxiliary_head=dict(type='STDCHead', num_classes=2, boundary_threshold=0.1))


@pytest.fixture(autouse=True)
def time_to_look(monkeypatch):
    """On a busy machine, too, a few samples are looked at."""
    monkeypatch.setattr('mmdyt.preflight.samples.SECONDS', 600)


def check(scope: str, model: dict, loops=('train', 'val'), **datasets) -> None:
    """Check a config with these data sets."""
    loaders = {f'{loop}_dataloader': dict(dataset=dataset) for loop, dataset in datasets.items()}
    with DefaultScope.overwrite_default_scope(scope):
        check_labels(Config(dict(model=model, **loaders)), loops)


def folders(root: Path, split: str, names: list[str], **options) -> dict:
    """A data set with a folder for each class."""
    for name in names:
        (root / split / name).mkdir(parents=True, exist_ok=True)
        (root / split / name / 'a.png').write_bytes(IMAGE)
    return dict(type='CustomDataset', data_root=str(root), data_prefix=split, pipeline=[LOAD]) | options


def listed(root: Path, split: str, lines: str, **options) -> dict:
    """A data set with a list, of files that are made."""
    for line in lines.splitlines():
        path = root / line.rpartition(' ')[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(IMAGE)
    (root / f'{split}.txt').write_text(lines)
    return dict(type='CustomDataset', data_root=str(root), ann_file=f'{split}.txt', pipeline=[LOAD]) | options


def by_folder(split: str, **labels: int) -> str:
    """Lines of a list whose folders are classes, two images each."""
    return ''.join(f'{split}/{name}/{i}.png {label}\n' for name, label in labels.items() for i in range(2))


def head(num_classes: int = 3) -> dict:
    return dict(head=dict(type='LinearClsHead', num_classes=num_classes))


def named(*names: str) -> dict:
    return dict(metainfo=dict(classes=names))


@pytest.mark.parametrize(
    ('names', 'got'),
    [
        (['dog', 'eel'], "without ['cat']"),
        (['cat', 'eel'], "without ['dog']"),
        (['cat', 'dog'], "without ['eel']"),
        (['cat', 'eel', 'fox'], "without ['dog'] and with ['fox'] besides"),
        (['cat', 'Dog', 'eel'], "without ['dog'] and with ['Dog'] besides"),
    ],
)
@pytest.mark.parametrize('wrap', [False, True])
@pytest.mark.parametrize('loop', ['val', 'test'])
def test_a_class_folder_that_is_missing_is_named(tmp_path, names, got, wrap, loop):
    other = folders(tmp_path, 'other', names)
    place = f'{loop}_dataloader.dataset'
    if wrap:
        other, place = dict(type='RepeatDataset', times=2, dataset=other), f'{place}.dataset'
    with pytest.raises(ValueError) as error:
        check('mmpretrain', head(), ('train', loop), train=folders(tmp_path, 'train', NAMES), **{loop: other})
    assert str(error.value).startswith(
        f'{place} must have the class folders of train_dataloader.dataset ({tmp_path}/train), '
        f'got {tmp_path}/other {got}.'
    )


CLASSES_DIFFER = r'val_dataloader.dataset.metainfo.classes must be those of train_dataloader.dataset'
ONE_LABEL = r'val_dataloader.dataset must give {} the label {} as {} of train_dataloader.dataset \(.*\) say, got {} by'


@pytest.mark.parametrize(
    ('train', 'val', 'message'),
    [
        (named(*NAMES), named('cat', 'eel', 'dog'), f"{CLASSES_DIFFER} .*, got 'eel' for label 1, not 'dog'"),
        (named(*NAMES), named('cat', 'eel'), f"{CLASSES_DIFFER} .*, got 'eel' for label 1, not 'dog'"),
        (named('cat', 'dog'), named('cat', 'dog', 'eel'), f"{CLASSES_DIFFER}, got 'eel' besides"),
        (named(*NAMES), named('a', 'b', 'c'), f"{CLASSES_DIFFER} .*, got 'a' for label 0, not 'cat'"),
        (named(*NAMES), dict(classes=['eel', 'dog', 'cat']), CLASSES_DIFFER),
        (named(*NAMES), dict(classes='{root}/reversed.txt'), CLASSES_DIFFER),
        (named(*NAMES), dict(metainfo=dict(classes='{root}/reversed.txt')), CLASSES_DIFFER),
        (named(*NAMES), dict(metainfo=dict(classes='gone.txt')), "classes must list names or name a file.*'gone.txt'"),
        (named(*NAMES), dict(classes='cat'), "val_dataloader.dataset.classes must list names or name a file.*'cat'"),
        (
            named(*NAMES, 'fox'),
            {},
            'model.head.num_classes must be at least 4, the classes of train_dataloader.dataset',
        ),
        ({}, named(*NAMES, 'fox'), 'model.head.num_classes must be at least 4, the classes of val_dataloader.dataset'),
    ],
)
def test_names_of_classes_that_differ_are_named(tmp_path, train, val, message):
    (tmp_path / 'reversed.txt').write_text('eel\ndog\ncat\n')
    val = json.loads(json.dumps(val).replace('{root}', str(tmp_path)))
    lines = 'a.png 0\nb.png 1\n'
    with pytest.raises(ValueError, match=message):
        datasets = dict(train=listed(tmp_path, 'train', lines, **train), val=listed(tmp_path, 'val', lines, **val))
        check('mmpretrain', head(), **datasets)


SWAPPED = dict(cat=1, dog=0, eel=2)
RIGHT = dict(cat=0, dog=1, eel=2)


@pytest.mark.parametrize(
    ('train', 'val', 'message'),
    [
        (by_folder('train', **RIGHT), by_folder('val', **SWAPPED), ONE_LABEL.format("'cat'", 0, 'paths and labels', 1)),
        (NAMES, by_folder('val', **SWAPPED), ONE_LABEL.format("'cat'", 0, 'class folders', 1)),
        (by_folder('train', **SWAPPED), NAMES, ONE_LABEL.format("'cat'", 1, 'paths and labels', 0)),
        ('a.png 1\nb.png 2\nc.png 3\n', 'a.png 0\nb.png 1\nc.png 2\n', 'must count labels from 1 as .*train.txt does'),
    ],
)
def test_lists_and_folders_that_number_classes_otherwise_are_named(tmp_path, train, val, message):
    sets = dict(train=train, val=val)
    sets = {k: (folders if isinstance(v, list) else listed)(tmp_path, k, v) for k, v in sets.items()}
    with pytest.raises(ValueError, match=message):
        check('mmpretrain', head(4), **sets)


@pytest.mark.parametrize(
    'make',
    [
        lambda root: folders(root, 'train', NAMES, **named('dog', 'cat', 'eel')),
        lambda root: listed(root, 'train', by_folder('x', **SWAPPED), **named(*NAMES)),
    ],
)
def test_names_of_classes_that_its_own_folders_belie_are_named(tmp_path, make):
    with pytest.raises(ValueError, match="train_dataloader.dataset must give 'cat' the label . as metainfo.classes"):
        check('mmpretrain', head(), ('train',), train=make(tmp_path))


@pytest.mark.parametrize(
    ('train', 'val'),
    [
        (NAMES, NAMES),
        (NAMES, by_folder('val', **RIGHT)),
        (NAMES, by_folder('val', cat=0, eel=2)),  # a list may lack a class
        (by_folder('train', **RIGHT), by_folder('val', dog=1, eel=2)),
        (by_folder('person', **RIGHT), by_folder('val', eve=0, bob=1)),  # other folders
        ('x/a.png 0\nx/b.png 1\ny/c.png 0\n', 'y/a.png 0\ny/b.png 1\nx/c.png 0\n'),  # folders that are no classes
        ('x/a.png 0\ny/b.png 1\n', 'y/a.png 0\nx/b.png 1\n'),  # nor need these be: one image each
        ('a.png 0\nb.png 1\n', 'a.png 1\nb.png 2\n'),  # too few to say that they are shifted
    ],
)
@pytest.mark.parametrize('options', [({}, {}), (named(*NAMES), named(*NAMES)), (dict(classes=NAMES), {})])
def test_sound_data_passes(tmp_path, train, val, options):
    sets = dict(train=train, val=val)
    sets = {
        k: (folders if isinstance(v, list) else listed)(tmp_path, k, v, **options[k == 'val']) for k, v in sets.items()
    }
    check('mmpretrain', head(), **sets)
    kinds = [dict(type='KFoldDataset', num_splits=2), dict(type='ClassBalancedDataset', oversample_thr=0.1)]
    for kind in kinds:
        check('mmpretrain', head(), **{k: kind | dict(dataset=v) for k, v in sets.items()})


@pytest.mark.parametrize(
    ('train', 'val'),
    [
        (named(*NAMES), named('cat', 'dog')),  # fewer classes, the same labels
        (named('traffic light', 'Bus'), named('traffic_light', 'bus')),
        (named(*NAMES), {}),
        (named('crane', 'dog', 'crane'), named('crane', 'dog', 'crane')),
        (named(*NAMES), dict(with_label=False)),
    ],
)
def test_names_that_agree_pass(tmp_path, train, val):
    lines = 'a.png 0\nb.png 1\n'
    val_lines = 'a.png\nb.png\n' if 'with_label' in val else lines
    train, val = listed(tmp_path, 'train', lines, **train), listed(tmp_path, 'val', lines, **val)
    (tmp_path / 'val.txt').write_text(val_lines)
    check('mmpretrain', head(), train=train, val=val)


def test_what_is_hidden_is_no_class(tmp_path):
    train, val = folders(tmp_path, 'train', NAMES), folders(tmp_path, 'val', NAMES)
    for split in ('train', 'val'):
        (tmp_path / split / '.DS_Store').write_bytes(b'')
    (tmp_path / 'val' / '.ipynb_checkpoints').mkdir()
    check('mmpretrain', head(), train=train, val=val)


@pytest.mark.parametrize(
    ('trained', 'tested', 'message'),
    [
        (NAMES, NAMES, None),
        (None, ['cat', 'eel'], None),
        (['Katze', 'Hund', 'Aal'], ['cat', 'eel'], None),  # other words: nothing is known
        (NAMES, ['cat', 'eel'], r"must have the class folders of the checkpoint .* without \['dog'\]"),
        (NAMES, ['cat', 'dog'], r"must have the class folders of the checkpoint .* without \['eel'\]"),
        (NAMES, by_folder('test', **SWAPPED), "must give 'cat' the label 0 as the classes of the checkpoint"),
        (NAMES, by_folder('test', dog=1, eel=2), None),
    ],
)
def test_a_test_numbers_classes_as_its_checkpoint_does(tmp_path, trained, tested, message):
    meta = dict(dataset_meta=dict(classes=tuple(trained))) if trained else {}
    torch.save(dict(meta=meta, state_dict={}), tmp_path / 'a.pth')
    test = (folders if isinstance(tested, list) else listed)(tmp_path, 'test', tested)
    cfg = Config(dict(model=head(), test_dataloader=dict(dataset=test), load_from=str(tmp_path / 'a.pth')))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        if message is None:
            check_labels(cfg, ('test',))
            return
        with pytest.raises(ValueError, match=f'test_dataloader.dataset {message}'):
            check_labels(cfg, ('test',))


def test_retrieval_may_be_tested_on_other_classes(tmp_path):
    sets = dict(train=folders(tmp_path, 'train', NAMES), val=folders(tmp_path, 'val', ['fox', 'gnu']))
    check('mmpretrain', head() | dict(prototype='a.pth'), **sets)


def multi(root: Path, *labels) -> dict:
    """A data set of mmpretrain in OpenMMLab's format."""
    data = [dict(img_path=f'{i}.png', gt_label=label) for i, label in enumerate(labels)]
    (root / 'data.json').write_text(json.dumps(dict(metainfo={}, data_list=data)))
    return dict(type='MultiLabelDataset', data_root=str(root), ann_file='data.json')


def frames(root: Path, *lines: str, **options) -> dict:
    """A data set of mmaction with folders of frames."""
    (root / 'frames.txt').write_text('\n'.join(lines) + '\n')
    prefix = dict(img=str(root))
    return dict(type='RawframeDataset', ann_file=str(root / 'frames.txt'), data_prefix=prefix, pipeline=[]) | options


@pytest.mark.parametrize(
    ('scope', 'make', 'message'),
    [
        ('mmpretrain', lambda root: multi(root, [0], [1, 2]), None),
        ('mmpretrain', lambda root: multi(root, [0], []), None),
        ('mmpretrain', lambda root: multi(root, [0], [1, 3]), r'labels in \[0, 3\).* got 3 in .*data.json, sample 1'),
        ('mmpretrain', lambda root: multi(root, [-1]), 'got -1 in'),
        ('mmpretrain', lambda root: dict(multi(root, [0]), ann_file='list.json'), 'form that MultiLabelDataset reads'),
        ('mmaction', lambda root: frames(root, 'a 3 0', 'b 3 2'), None),
        ('mmaction', lambda root: frames(root, 'a 3 0 2', multi_class=True, num_classes=3), None),
        (
            'mmaction',
            lambda root: frames(root, 'a 3 0', 'b 3 3'),
            r'labels in \[0, 3\).* got 3 in .*frames.txt, sample 1',
        ),
        ('mmaction', lambda root: frames(root, 'a 3'), 'got -1 in .*frames.txt, sample 0'),
        ('mmaction', lambda root: frames(root, 'a b 0'), 'the form that RawframeDataset reads'),
        ('mmaction', lambda root: frames(root, 'a 0 3 1', with_offset=True), None),
    ],
)
def test_labels_in_other_formats(tmp_path, scope, make, message):
    (tmp_path / 'list.json').write_text('[]')
    model = head() if scope == 'mmpretrain' else dict(cls_head=dict(type='I3DHead', num_classes=3))
    if message is None:
        check(scope, model, ('train',), train=make(tmp_path))
        return
    with pytest.raises(ValueError, match=f'train_dataloader.dataset.ann_file must have .*{message}'):
        check(scope, model, ('train',), train=make(tmp_path))


def scenes(root: Path, split: str, masks: list, classes=('sky', 'road', 'car'), steps=(LOAD_MASK,), **options) -> dict:
    """A data set of mmseg, its masks arrays or bytes."""
    for i, mask in enumerate(masks):
        for kind, content in (('images', IMAGE), ('masks', mask)):
            path = root / kind / split / f'{i:02}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(cv2.imencode('.png', content)[1].tobytes() if isinstance(content, np.ndarray) else content)
    return dict(
        type='BaseSegDataset',
        data_root=str(root),
        data_prefix=dict(img_path=f'images/{split}', seg_map_path=f'masks/{split}'),
        img_suffix='.png',
        metainfo=dict(classes=classes) if classes else None,
        pipeline=[LOAD, *steps, dict(type='PackSegInputs')],
        **options,
    )


def mask(*values: int, dtype=np.uint8) -> np.ndarray:
    """A mask of these labels in stripes."""
    return np.resize(np.array(values, dtype), (8, 12))


def segmentor(decode=3, auxiliary=(), **options) -> dict:
    heads = [dict(type='FCNHead', num_classes=number) for number in auxiliary]
    return dict(decode_head=dict(type='FCNHead', num_classes=decode, **options), auxiliary_head=heads)


GOOD, COLOURS = mask(0, 1, 2, 255), np.zeros((8, 12, 3), np.uint8)


@pytest.mark.parametrize(
    ('masks', 'options', 'model', 'message'),
    [
        ([GOOD, mask(0, 3)], {}, segmentor(), r'\[0, 3\).*got \[3\] in .*/masks/train/01.png \(1 bad of 2 masks'),
        ([GOOD] * 99 + [mask(7)], {}, segmentor(), r'\[7\] in .*99.png \(1 bad of 16 masks looked at, 100 in'),
        ([GOOD, mask(254)], {}, segmentor(), r'got \[254\]'),
        ([GOOD, mask(1, 2, 3, 4)], REDUCED, segmentor(), r'got \[3\]'),
        ([mask(3)], dict(classes=None), segmentor(), r'labels in \[0, 3\)'),
        ([mask(3)], {}, segmentor(5), r'labels in \[0, 3\)'),
        ([mask(0, 300, dtype=np.uint16)], {}, segmentor(), 'labels of at most 255, got 300 in .*00.png'),
        ([GOOD, COLOURS], {}, segmentor(), 'a mask of one channel, got 3 in .*01.png'),
        ([GOOD, np.zeros((8, 9), np.uint8)], {}, segmentor(), 'its image, 12 x 8 in .*got 9 x 8 in .*01.png'),
        ([GOOD, b''], {}, segmentor(), 'a sound mask, got .*/masks/train/01.png: it is empty'),
        ([GOOD], {}, segmentor(2), r'model.decode_head.num_classes must be at least 3, .* train_.*, got 2\.'),
        ([GOOD], {}, segmentor(3, [3, 2]), r'model.auxiliary_head\[1\].num_classes must be at least 3'),
        ([GOOD], {}, segmentor(2, out_channels=1), 'model.decode_head.num_classes must be at least 3'),
        ([GOOD], dict(steps=[LOAD_REDUCED]), segmentor(), 'reduce_zero_label must be that of'),
    ],
)
def test_masks_and_heads_that_do_not_fit_are_named(tmp_path, masks, options, model, message):
    with pytest.raises(ValueError, match=message):
        check('mmseg', model, ('train',), train=scenes(tmp_path, 'train', masks, **options))


class ToClasses:
    """A transform of the user's own."""

    def __call__(self, results):
        return results


@pytest.mark.parametrize(
    ('masks', 'options', 'model'),
    [
        ([GOOD] * 40, {}, segmentor(3, [3, 3])),
        ([mask(0, 1, 2, 3, 255)], REDUCED, segmentor()),
        ([mask(0, 1, 2, 3)], REDUCED | dict(steps=[LOAD_REDUCED]), segmentor()),
        ([mask(0, 1, 255)], BINARY, segmentor(2, [2], out_channels=1, threshold=0.3)),
        ([mask(0, 1)], BINARY, segmentor(1, [1])),
        ([mask(0, 1)], dict(classes=('yes',)), segmentor(1)),
        ([mask(0, 255)] * 3 + [mask(0, 1)], BINARY, segmentor(2)),
        ([GOOD], {}, segmentor(150, [150])),  # more than there are
        ([mask(0, 9)], {}, segmentor(ignore_index=9)),
        ([mask(0, 9)], dict(ignore_index=9), segmentor()),
        ([GOOD], {}, segmentor(3) | EDGES),
        ([GOOD], dict(classes=None), segmentor()),
        ([COLOURS], dict(steps=[LOAD_MASK, dict(type='test_labels_ToClasses')]), segmentor()),
        ([mask(0, 9)], dict(steps=[]), segmentor()),  # masks that are not loaded
        ([mask(7, 26, 33)], dict(classes=('car',), type='test_labels_Mapped'), segmentor(1)),
    ],
)
def test_masks_and_heads_that_fit_pass(tmp_path, masks, options, model):
    from mmengine.registry import DATASETS, TRANSFORMS
    from mmseg.datasets import BaseSegDataset

    class Mapped(BaseSegDataset):
        METAINFO = dict(classes=tuple(f'{i}' for i in range(33)) + ('car',))

    TRANSFORMS.register_module(module=ToClasses, name='test_labels_ToClasses', force=True)
    DATASETS.register_module(module=Mapped, name='test_labels_Mapped', force=True)
    kind = options.get('type', 'BaseSegDataset')
    options = {key: value for key, value in options.items() if key != 'type'}
    dataset = scenes(tmp_path, 'train', masks, **options) | dict(type=kind)
    check('mmseg', model, ('train',), train=dataset)


def test_one_data_set_reduces_label_zero_as_the_other(tmp_path):
    masks = [mask(0, 1, 2)]
    sets = [scenes(tmp_path, split, masks, reduce_zero_label=split == 'train') for split in ('train', 'val')]
    with pytest.raises(
        ValueError, match='val_dataloader.dataset.reduce_zero_label must be True as in train_dataloader'
    ):
        check('mmseg', segmentor(), train=sets[0], val=sets[1])


def test_names_of_mmseg_are_compared_where_one_split_has_others(tmp_path):
    sets = [scenes(tmp_path, 'a', [GOOD], classes) for classes in (('sky', 'road', 'car'), ('road', 'sky', 'car'))]
    with pytest.raises(ValueError, match="classes must be those of train_.* got 'road' for label 0, not 'sky'"):
        check('mmseg', segmentor(), train=dict(type='ConcatDataset', datasets=[sets[0]]), val=sets[1])
    with pytest.raises(ValueError, match=r'train_dataloader.dataset.datasets\[1\].metainfo.classes must be those of'):
        check('mmseg', segmentor(), ('train',), train=dict(type='ConcatDataset', datasets=sets))


def test_a_broken_image_among_the_few_that_are_opened_is_named(tmp_path):
    data = scenes(tmp_path, 'train', [GOOD] * 3)
    (tmp_path / 'images/train/02.png').write_bytes(IMAGE[:60])
    with pytest.raises(ValueError, match='a sound image, got .*/images/train/02.png: it is cut short'):
        check('mmseg', segmentor(), ('train',), train=data)
    sets = folders(tmp_path, 'val', NAMES), listed(tmp_path, 'test', 'x.png 0\n')
    for file, dataset in zip((tmp_path / 'val/eel/a.png', tmp_path / 'x.png'), sets, strict=True):
        check('mmpretrain', head(), ('val',), val=dataset)
        file.write_bytes(b'text')
        with pytest.raises(ValueError, match=f'a sound image, got {file}: it is no image'):
            check('mmpretrain', head(), ('val',), val=dataset)


@pytest.mark.parametrize('orientation', [1, 3])
def test_an_image_that_exif_turns_is_worth_a_word(tmp_path, orientation, monkeypatch):
    import io

    from PIL import Image

    data, file, exif = scenes(tmp_path, 'train', [GOOD]), io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new('RGB', (12, 8)).save(file, 'JPEG', exif=exif)
    (tmp_path / 'images/train/00.png').write_bytes(file.getvalue())
    words = []
    monkeypatch.setattr('mmdyt.preflight.samples.warn', words.append)
    check('mmseg', segmentor(), ('train',), train=data)
    assert [('orientation 3' in word, '00.png' in word) for word in words] == [(True, True)] * (orientation == 3)


@pytest.mark.parametrize(
    ('model', 'found'),
    [
        (head(7), [('model.head', 7)]),
        (dict(module=dict(module=dict(cls_head=dict(num_classes=7)))), [('model.cls_head', 7)]),
        (segmentor(3, [4]), [('model.decode_head', 3), ('model.auxiliary_head[0]', 4)]),
        (
            dict(decode_head=[dict(num_classes=3), dict(num_classes=3)]),
            [(f'model.decode_head[{i}]', 3) for i in (0, 1)],
        ),
        (segmentor(2, out_channels=1), [('model.decode_head', 2)]),
        (segmentor(1), [('model.decode_head', 2)]),
        (dict(head=dict(type='MultiTaskHead', task_heads=dict(a=dict(num_classes=3)))), []),
    ],
)
def test_heads_are_found_with_their_room(model, found):
    with DefaultScope.overwrite_default_scope('mmseg'):
        assert [(head.where, head.room) for head in model_heads(Config(model))] == found
        tested = [head.where for head in model_heads(Config(model), train=False)]
    assert tested == [where for where, _ in found if 'auxiliary' not in where]


@pytest.fixture
def three_folders(tmp_path):
    """Options of the tiny classification config for class folders of 20 images each."""
    for split in ('train', 'val'):
        for name in NAMES:
            folders(tmp_path, split, [name])
            for i in range(20):
                (tmp_path / split / name / f'{i}.png').write_bytes(IMAGE)
    options = [
        f'{loop}_dataloader.dataset.{option}'
        for loop in ('train', 'val')
        for option in (f'data_root={tmp_path}', 'ann_file=', f'data_prefix={loop}')
    ]
    return [*options, 'train_cfg.max_epochs=1', 'train_cfg.val_interval=1']


def test_training_refuses_a_missing_class_folder_and_writes_nothing(
    run_tool, tiny_cls_config, tmp_path, three_folders, capfd
):
    (tmp_path / 'val' / 'dog').rename(tmp_path / 'dog')
    with pytest.raises(SystemExit, match='2'):
        run_tool('train', tiny_cls_config, '--work-dir', tmp_path / 'run', '--cfg-options', *three_folders)
    assert capfd.readouterr().err.startswith('error: val_dataloader.dataset must have the class folders of')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_bad_image_that_was_not_looked_at_stops_the_run_with_its_name(
    run_tool, tiny_cls_config, tmp_path, three_folders, split, capsys
):
    (bad := tmp_path / split / 'dog' / '7.png').write_bytes(IMAGE[:60])
    workers = [f'{split}_dataloader.{option}' for option in ('num_workers=1', 'persistent_workers=True')]
    with pytest.raises(SystemExit, match='1'):
        run_tool('train', tiny_cls_config, '--work-dir', tmp_path / 'run', '--cfg-options', *three_folders, *workers)
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith(f'error: img_path must name a sound image, got {bad}: it is cut short')
    )


def test_black_and_white_masks_are_told(tmp_path, capsys):
    check('mmseg', segmentor(2), ('train',), train=scenes(tmp_path, 'train', [mask(0, 255)] * 3, **BINARY))
    assert 'masks looked at have labels 0 and 255, which is ignored' in capsys.readouterr().err


@pytest.mark.parametrize('number', [True, '3', 3.5])
def test_a_number_of_classes_is_a_whole_number(number):
    with pytest.raises(ValueError, match=f'model.decode_head.num_classes must be a positive integer, got {number!r}'):
        model_heads(Config(dict(decode_head=dict(num_classes=number))))


def test_little_time_is_spent_on_large_images(tmp_path, monkeypatch):
    monkeypatch.setattr('mmdyt.preflight.samples.SECONDS', 0)
    check('mmseg', segmentor(), ('train',), train=scenes(tmp_path, 'train', [GOOD, mask(7)]))
    with pytest.raises(ValueError, match=r'1 bad of 1 masks looked at, 2 in all'):
        check('mmseg', segmentor(), ('train',), train=scenes(tmp_path, 'train', [mask(7), GOOD]))
