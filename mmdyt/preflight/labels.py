"""Do labels mean the same in every data set, and does the model tell as many classes apart?

mmpretrain numbers the class folders that it finds: with one of them missing in validation, every later label is off,
and nothing says so but the accuracy.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS

from mmdyt.core.options import is_integer

from .datasets import IMAGES, VIDEOS, check_data, fetches_itself, head_classes, kind_of, nested, unread
from .label_names import CLASSES, FOLDERS, TRAINED, Names, class_names, label_names, trained_names
from .refusals import warn
from .samples import ignored_labels, look

READ_BY_HOST = {'mmengine.dataset.base_dataset': 'gt_label', 'mmaction.datasets.rawframe_dataset': 'label'}
PLAIN_LOSS = 'mmseg.models.decode_heads.decode_head'


class Head(NamedTuple):
    """A head that tells classes apart: its place in the config, its ``num_classes``, and how many it can tell."""

    where: str
    num_classes: int
    room: int


def check_labels(cfg: Config, loops: tuple[str, ...]) -> None:
    """Refuse data sets that :func:`check_data` refuses, or whose labels do not fit each other or the model.

    A few images and masks of each are opened, see :func:`~mmdyt.preflight.samples.look`.

    Args:
        cfg: The config; its modules are imported.
        loops: Which of ``'train'``, ``'val'``, ``'test'`` will run.

    Raises:
        FileNotFoundError: If a data root, folder or annotation file is missing.
        ValueError: If a list, class folder, name of a class, head, label or image is wrong.
    """
    heads = model_heads(cfg.model, train='train' in loops)
    known = [] if 'train' in loops else list(trained_names(cfg.get('load_from')))
    same = not cfg.model.get('prototype')  # retrieval may be tested on classes that it never saw
    shifts: dict[type, tuple[str, bool]] = {}
    for loop in loops:
        where = f'{loop}_dataloader.dataset'
        dataset = (cfg.get(f'{loop}_dataloader') or {}).get('dataset')
        for place, part in nested(dataset, where):
            class_names(part, place)  # before the host looks for a file that is none
        check_data(dataset, where, head_classes(cfg.model))
        for place, part in nested(dataset, where):
            if part.get('dataset') or part.get('datasets') or fetches_itself(part):
                continue
            names = list(label_names(part, place))
            for found in names:
                if found.source == CLASSES and found.classes:  # which may be fewer than the head tells apart
                    check_data(part, place, found.classes, files=False)
            for i, found in enumerate(names):
                _check_room(heads, found, train=loop == 'train')
                for before in [*(_first(known) if same else []), *names[:i]]:
                    check_same(before, found)
            known += names
            room = min((head.room for head in heads), default=None)
            classes = max((found.classes for found in names), default=0) or None
            _check_host_list(part, place, classes if room is None else room)
            data = look(part, place, classes, room, ignored_labels(cfg.model))
            _check_shift(data, place, shifts)


def model_heads(model: ConfigDict, train: bool = True) -> list[Head]:
    """The heads of a model that tell the classes of its data apart, inside any wrapper.

    Args:
        model: Its config.
        train: Whether it is trained; tests do not run auxiliary heads.
    """
    while model.get('module'):
        model = model['module']
    found = []
    for name in ('head', 'cls_head', 'decode_head', *(['auxiliary_head'] if train else [])):
        value = model.get(name)
        for i, head in enumerate(value if isinstance(value, list | tuple) else [value]):
            number = head.get('num_classes') if isinstance(head, Mapping) else None
            if number is None:
                continue
            if not is_integer(number):
                raise ValueError(f'model.{name}.num_classes must be a positive integer, got {number!r}.')
            if number < 1:  # of losses without classes
                continue
            if name == 'auxiliary_head' and not _learns_classes(head):
                continue
            binary = name.endswith('e_head') or name == 'auxiliary_head'
            binary = binary and 1 in (number, head.get('out_channels'))  # a threshold tells two classes apart
            where = f'model.{name}[{i}]' if isinstance(value, list | tuple) else f'model.{name}'
            found.append(Head(where, number, 2 if binary else number))
    return found


def check_same(before: Names, found: Names) -> None:
    """Refuse two data sets that mean different things by a label.

    Args:
        before: Of the first data set, as a rule that of training.
        found: Of another one, or what else says of the same one.

    Raises:
        ValueError: Naming the first class that differs.
    """
    trained = before.source == TRAINED and before.labels.keys() & found.labels.keys()
    if found.source == FOLDERS and (before.source == FOLDERS or trained):
        _check_same_folders(before, found)
    if before.source == found.source == CLASSES:
        _check_same_classes(before, found)
    for name, label in found.labels.items():
        if before.labels.get(name, label) != label:
            raise ValueError(
                f'{found.where} must give {name!r} the label {before.labels[name]} as {before.source} of '
                f'{before.where} ({before.place}) say, got {label} by {found.source} ({found.place}).'
            )
    a, b = before.values, found.values
    if len(a) > 2 and b in ({label + 1 for label in a}, {label - 1 for label in a}):
        raise ValueError(
            f'{found.where}.ann_file must count labels from {min(a)} as {before.place} does, '
            f'got {min(b)} to {max(b)} in {found.place}.'
        )


def _check_same_folders(before: Names, found: Names) -> None:
    """Refuse class folders that are not those of another data set."""
    missing, more = (sorted(a.labels.keys() - b.labels.keys()) for a, b in ((before, found), (found, before)))
    if missing or more:
        got = f'without {missing[:3]}' if missing else ''
        got += (' and ' if missing and more else '') + (f'with {more[:3]} besides' if more else '')
        raise ValueError(
            f'{found.where} must have the class folders of {before.where} ({before.place}), got {found.place} {got}. '
            'Folders are numbered as they are found, so labels would mean other classes. Let both have the same '
            'folders, empty ones too, or use lists (ann_file).'
        )


def _check_same_classes(before: Names, found: Names) -> None:
    """Refuse names of classes that differ from those of another data set; fewer of them are none the worse."""
    for (first, label), second in zip(before.labels.items(), found.labels, strict=False):
        if _plain(first) != _plain(second):
            raise ValueError(
                f'{found.where}.{CLASSES} must be those of {before.where} in the same order, '
                f'got {second!r} for label {label}, not {first!r}.'
            )
    if len(found.labels) > len(before.labels) and before.where.startswith('train'):
        extra = list(found.labels)[len(before.labels)]
        raise ValueError(f'{found.where}.{CLASSES} must be those of {before.where}, got {extra!r} besides.')


def _plain(name: str) -> str:
    """A name of a class, however it is spelt."""
    return re.sub(r'[\s_-]', '', name.casefold())


def _first(known: list[Names]) -> list[Names]:
    """The first that each source said."""
    return list({names.source: names for names in reversed(known)}.values())


def _check_room(heads: list[Head], found: Names, train: bool) -> None:
    """Refuse a head with fewer classes than the data; for one with more there is a word."""
    for head in heads:
        if found.classes > head.room:
            raise ValueError(
                f'{head.where}.num_classes must be at least {found.classes}, the classes of {found.where}, '
                f'got {head.num_classes}.'
            )
        if train and 0 < found.classes < head.num_classes:
            warn(
                f'{head.where} has {head.num_classes} classes, {found.where} has {found.classes}: '
                'the others will not be trained.'
            )


def _learns_classes(head: ConfigDict) -> bool:
    """Whether an auxiliary head is trained on the labels of the data: some learn edges, say."""
    kind = head.get('type')
    with MODELS.switch_scope_and_registry(head.get('_scope_')) as registry:
        kind = registry.get(kind) if isinstance(kind, str) else kind
    return getattr(getattr(kind, 'loss_by_feat', None), '__module__', None) == PLAIN_LOSS


def _check_host_list(dataset: ConfigDict, where: str, classes: int | None) -> None:
    """Refuse labels beyond the classes in formats that the host reads: mmengine's JSON, lists of frame folders."""
    kind = kind_of(dataset)
    key = READ_BY_HOST.get(getattr(getattr(kind, 'load_data_list', None), '__module__', None))
    if key is None or not dataset.get('ann_file') or not kind.__module__.startswith(('mmpretrain.', 'mmaction.')):
        return
    data = unread(dataset, VIDEOS if key == 'label' else IMAGES)
    try:
        samples = data.load_data_list()
    except (AssertionError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{where}.ann_file must have the form that {kind.__name__} reads, got another in {data.ann_file} '
            f'({type(error).__name__}: {error}).'
        ) from error
    named = data.metainfo.get('classes')
    classes = len(named) if named and classes is None else classes
    for i, sample in enumerate(samples):
        labels = sample.get(key, [])
        for label in labels if isinstance(labels, list) else [labels]:
            if isinstance(label, int) and classes is not None and not 0 <= label < classes:
                raise ValueError(
                    f'{where}.ann_file must have labels in [0, {classes}), the classes of the head, '
                    f'got {label} in {data.ann_file}, sample {i}.'
                )


def _check_shift(data, where: str, shifts: dict[type, tuple[str, bool]]) -> None:
    """Refuse data sets of one class of mmseg that take label zero for different things."""
    if not hasattr(data, 'reduce_zero_label'):
        return
    first, value = shifts.setdefault(type(data), (where, data.reduce_zero_label))
    if value != data.reduce_zero_label:
        raise ValueError(
            f'{where}.reduce_zero_label must be {value} as in {first}, got {data.reduce_zero_label}: '
            'labels would be off by one.'
        )
