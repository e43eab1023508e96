"""Are the files of a data set where its config says?"""

import inspect
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import ConfigDict
from mmengine.fileio import list_dir_or_file
from mmengine.registry import DATASETS

from mmdyt.preflight.lists import check_class_folders, check_list, image_lines, video_lines

# the modules whose data sets read lists of "path label", and the name of the folder that holds the files
IMAGES = 'mmpretrain.datasets.custom'  # CustomDataset, which reads class folders, too
VIDEOS = 'mmaction.datasets.video_dataset'  # VideoDataset
FOLDERS = {IMAGES: 'img_path', VIDEOS: 'video'}


def check_data(dataset: ConfigDict | None, where: str, num_classes: int | None = None, *, files: bool = True) -> None:
    """Refuse a data set config whose root, folders, annotation file or images do not exist, or whose labels are wrong.

    Looks into wrappers (``dataset``, ``datasets``). Addresses, and data sets that download themselves, are left alone.

    Args:
        dataset: Its config, of a registered type; None is nothing to check.
        where: Path of ``dataset`` in the config, for the message.
        num_classes: Of the head, from :func:`head_classes`; None leaves the range of labels open.
        files: Whether the files that a list of samples names must exist.

    Raises:
        FileNotFoundError: If a folder or an annotation file is missing.
        TypeError: If a path is no string.
        ValueError: If a list of samples, or the number of class folders, is wrong.
    """
    for place, part in nested(dataset, where):
        _check_one(part, place, num_classes, files)


def nested(dataset: ConfigDict | None, where: str) -> Iterator[tuple[str, ConfigDict]]:
    """A data set config behind all those inside it (``dataset``, ``datasets``), each with its path in the config."""
    if not dataset:
        return
    for name in ('dataset', 'datasets'):
        inner = dataset.get(name)
        for i, part in enumerate(inner if isinstance(inner, list) else [inner]):
            yield from nested(part, f'{where}.{name}' + (f'[{i}]' if isinstance(inner, list) else ''))
    yield where, dataset


def head_classes(model: ConfigDict) -> int | None:
    """How many classes a classifier tells apart, inside any wrapper; None for another model."""
    while model.get('module'):
        model = model['module']
    head = model.get('head') or model.get('cls_head')
    number = head.get('num_classes') if isinstance(head, dict) else None
    return number if isinstance(number, int) and number > 0 else None


def fetches_itself(dataset: ConfigDict) -> bool:
    """Whether a data set is read from an address, or downloads itself: before training nothing need be there."""
    return '://' in (dataset.get('data_root') or '') or option(dataset, 'download') is True


def _check_one(dataset: ConfigDict, where: str, num_classes: int | None, files: bool) -> None:
    """Refuse what is wrong with a data set, not with those inside it."""
    root = _path(dataset.get('data_root'), f'{where}.data_root')
    if fetches_itself(dataset):
        return
    if root and not Path(root).expanduser().is_dir():
        raise FileNotFoundError(
            f'{where}.data_root must name an existing folder, got {root}. '
            f'Put the data there, or set it: --cfg-options {where}.data_root=FOLDER'
        )
    prefixes = dataset.get('data_prefix') or {}
    prefixes = prefixes if isinstance(prefixes, dict) else {'': prefixes}
    folders = {}
    for name, prefix in prefixes.items():
        name = f'{where}.data_prefix.{name}'.rstrip('.')
        folders[name] = folder = Path(root, _path(prefix, name)).expanduser()
        if prefix and not folder.is_dir():
            raise FileNotFoundError(f'{name} must name an existing folder, got {folder}.')
    annotations = _path(dataset.get('ann_file'), f'{where}.ann_file')
    if annotations and not Path(root, annotations).expanduser().is_file():
        raise FileNotFoundError(f'{where}.ann_file must name an existing file, got {Path(root, annotations)}.')
    if not annotations:
        _check_pairs(dataset, where, folders)
    _check_samples(dataset, where, num_classes, files)


def list_reader(dataset: ConfigDict) -> str:
    """The module of mmpretrain or mmaction that reads the data set's list or class folders; '' for other formats."""
    kind = kind_of(dataset)
    reader = getattr(getattr(kind, 'load_data_list', None), '__module__', None)
    if reader not in FOLDERS or not kind.__init__.__module__.startswith(reader.partition('.')[0] + '.'):
        return ''  # a user's own constructor may take anything
    return reader


def unread(dataset: ConfigDict, reader: str):
    """The data set, built without reading anything, but its paths joined."""
    # a class of mmaction insists on its pipeline
    return DATASETS.build({**dataset, 'lazy_init': True} | ({} if reader == VIDEOS else {'pipeline': []}))


def _check_samples(dataset: ConfigDict, where: str, num_classes: int | None, files: bool) -> None:
    """Refuse wrong lines of a list "path label", or too many class folders; other formats are left alone."""
    reader = list_reader(dataset)
    if not reader:
        return
    _check_keys(dataset, where, reader)
    data = unread(dataset, reader)
    folder = data.data_prefix[FOLDERS[reader]]
    files = files and not any(is_remote(step) for step in dataset.get('pipeline') or [])
    if reader == VIDEOS:
        if data.multi_class and (data.num_classes is None or num_classes not in (None, data.num_classes)):
            known = 'set' if num_classes is None else f'{num_classes}, the classes of the head,'
            raise ValueError(f'{where}.num_classes must be {known} with multi_class, got {data.num_classes}.')
        lines = video_lines(data.delimiter, data.multi_class)
        check_list(data.ann_file, folder, where, num_classes, lines=lines, files=files)
    elif data.ann_file:
        check_list(data.ann_file, folder, where, num_classes, lines=image_lines(data.with_label), files=files)
    elif data.with_label:
        check_class_folders(folder, where, num_classes)


def _check_keys(dataset: ConfigDict, where: str, reader: str) -> None:
    """Refuse a data set without the folder, or the list, that its class asks for."""
    prefix = dataset.get('data_prefix')
    wrong = FOLDERS[reader] not in prefix if isinstance(prefix, dict) else reader == VIDEOS and prefix is not None
    if wrong:
        got = dict(prefix) if isinstance(prefix, dict) else repr(prefix)
        raise ValueError(f'{where}.data_prefix must name {FOLDERS[reader]}, got {got}.')
    if reader == VIDEOS and not dataset.get('ann_file'):
        raise ValueError(f'{where}.ann_file must name a list of videos, got {dataset.get("ann_file")!r}.')


def is_remote(step: ConfigDict) -> bool:
    """Whether a step of a pipeline reads files elsewhere than from disk."""
    elsewhere = step.get('io_backend', 'disk') not in ('disk', 'local')
    return bool(elsewhere or step.get('backend_args') or step.get('file_client_args'))


def _check_pairs(dataset: ConfigDict, where: str, folders: dict[str, Path]) -> None:
    """Refuse a segmentation folder without images, or with an image that has no annotation."""
    images, masks = (folders.get(f'{where}.data_prefix.{name}') for name in ('img_path', 'seg_map_path'))
    suffix, mask_suffix = (option(dataset, name) for name in ('img_suffix', 'seg_map_suffix'))
    if images is None or not suffix:
        return
    # as mmseg lists them: without hidden files, through links
    names = sorted(list_dir_or_file(images, list_dir=False, suffix=suffix, recursive=True))
    if not names:
        raise FileNotFoundError(f'{where}.img_suffix must end some file of {images}, got {suffix!r}.')
    if masks is None or not mask_suffix:
        return
    missing = [name for name in names if not (masks / (name.removesuffix(suffix) + mask_suffix)).is_file()]
    if missing:
        first = missing[0].removesuffix(suffix) + mask_suffix
        raise FileNotFoundError(
            f'{where} must have an annotation for each of its {len(names)} images, got none for {len(missing)}, '
            f'first {masks / first}. Their ending is seg_map_suffix.'
        )


def _path(value: str | None, name: str) -> str:
    """A path of the config, or nothing."""
    if value is None:
        return ''
    if not isinstance(value, str):
        raise TypeError(f'{name} must be a string, got {value!r}.')
    return value


def option(dataset: ConfigDict, name: str):
    """An argument of the data set, or its default; None where it has no such argument."""
    kind = kind_of(dataset)
    if name in dataset or kind is None:
        return dataset.get(name)
    parameter = inspect.signature(kind).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def kind_of(dataset: ConfigDict) -> type | None:
    """The class of the data set; None where the config names none."""
    kind = dataset.get('type')
    with DATASETS.switch_scope_and_registry(dataset.get('_scope_')) as registry:
        return registry.get(kind) if isinstance(kind, str) else kind
