"""What a data set calls its labels: names of classes in its config, class folders, folders in the paths of a list."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import ConfigDict
from mmengine.fileio import list_from_file

from .datasets import VIDEOS, kind_of, list_reader, unread
from .lists import LineFormat, class_folders, image_lines, video_lines

CLASSES, FOLDERS, LISTED, TRAINED = 'metainfo.classes', 'class folders', 'paths and labels', 'the classes'
HOSTS = ('mmpretrain.', 'mmseg.', 'mmdyt.')
MOST_LINES = 100_000  # of a list; of longer ones a part is read


class Names(NamedTuple):
    """What a data set calls its labels.

    Args:
        where: Its place in the config.
        source: What says so: ``metainfo.classes``, class folders, or a list whose folders are classes.
        place: The file or folder that does.
        labels: Labels by name.
        classes: How many classes that makes at least.
        values: All labels of a list; empty for others.
    """

    where: str
    source: str
    place: str
    labels: dict[str, int]
    classes: int
    values: frozenset[int] = frozenset()


def label_names(dataset: ConfigDict, where: str) -> Iterator[Names]:
    """What says how the labels of a data set are called, as far as it is known without reading samples."""
    kind, reader = kind_of(dataset), list_reader(dataset)
    classes = class_names(dataset, where)
    if classes:
        labels = {f'{name}': i for i, name in enumerate(classes)}
        # a name that stands there twice says nothing
        once = labels if len(labels) == len(classes) else {f'#{i} {name}': i for i, name in enumerate(classes)}
        given = 'classes' in {**dataset, **(dataset.get('metainfo') or {})}
        # what a class of data sets names may be more than a list of samples, or a format of the user's own, has
        sure = given or not reader and kind.load_data_list.__module__.startswith(HOSTS)
        yield Names(where, CLASSES, f'{len(classes)} names', once, len(classes) if sure else 0)
    if not reader:
        return
    data = unread(dataset, reader)
    if reader == VIDEOS:
        yield from _listed(where, data.ann_file, video_lines(data.delimiter, data.multi_class))
    elif data.with_label and data.ann_file:
        yield from _listed(where, data.ann_file, image_lines())
    elif data.with_label:
        folders = class_folders(data.img_prefix)
        yield Names(where, FOLDERS, data.img_prefix, {name: i for i, name in enumerate(folders)}, len(folders))


def class_names(dataset: ConfigDict, where: str) -> list:
    """Names of the classes of a data set, by its config or its class.

    Raises:
        ValueError: If they are a text that names no file.
    """
    kind, metainfo = kind_of(dataset), dataset.get('metainfo') or {}
    if not hasattr(kind, '_load_metainfo') or not isinstance(metainfo, Mapping):
        return []
    given, place = metainfo.get('classes'), f'{where}.{CLASSES}'
    if given is None and dataset.get('classes') is not None:
        given, place = dataset['classes'], f'{where}.classes'
    if isinstance(given, str):
        if '://' not in given and not Path(given).expanduser().is_file():
            raise ValueError(f'{place} must list names or name a file of them, a name a line, got {given!r}.')
        return list_from_file(str(Path(given).expanduser()))
    if given is None:
        given = kind._load_metainfo({}).get('classes')
    return list(given) if isinstance(given, list | tuple) else []


def _listed(where: str, file: str, lines: LineFormat) -> Iterator[Names]:
    """What a list says: the labels of folders, where each folder is a class, and which labels there are."""
    texts = list_from_file(file)
    found: dict[str, list] = {}
    values = set()
    for text in texts[:: len(texts) // MOST_LINES + 1]:
        path, labels, problem = lines.split(text)
        labels = [int(label) for label in labels] if not problem else []
        values |= set(labels)
        for label in labels:
            found.setdefault(Path(path).parent.name, []).append(label)
    sound = all(len(labels) > 1 and len(set(labels)) == 1 for name, labels in found.items())
    names = {name: labels[0] for name, labels in found.items()} if sound else {}
    names = names if len(set(names.values())) == len(names) > 1 else {}
    yield Names(where, LISTED, file, names, 0, frozenset(values) if len(texts) <= MOST_LINES else frozenset())


def trained_names(checkpoint: str | None) -> Iterator[Names]:
    """The classes that a checkpoint was trained on; a file that cannot be read is refused elsewhere."""
    try:
        meta = torch.load(checkpoint, map_location='cpu', mmap=True, weights_only=True)['meta']
        classes = list(meta['dataset_meta']['classes'])
    except Exception:
        return
    labels = {f'{name}': i for i, name in enumerate(classes)}
    if len(labels) == len(classes):
        yield Names('the checkpoint', TRAINED, checkpoint, labels, 0)
