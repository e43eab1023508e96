"""A few images and masks of every data set are opened: can they be read, and are the labels of masks classes?"""

import os
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from mmengine.config import ConfigDict
from mmengine.fileio import list_from_file
from mmengine.registry import TRANSFORMS

from mmdyt.compat.loading import exif_orientation, many_channels

from .datasets import IMAGES, is_remote, kind_of, list_reader, unread
from .lists import class_folders, image_lines
from .refusals import warn

LOOK = 16  # samples, evenly spread
SECONDS = 3.0  # for one data set: of large images fewer are looked at
MASKS = 'mmseg.datasets.basesegdataset'
HOSTS = ('mmcv', 'mmpretrain', 'mmseg', 'mmdyt', 'functools')  # torchvision's transforms are partial functions
WIDE = {'I', 'F'}  # Pillow's modes of more than 8 bits begin so


def look(dataset: ConfigDict, where: str, classes: int | None, room: int | None, ignored: set[int]):
    """Refuse a data set if one of a few images cannot be read, or one of a few masks has labels that are no classes.

    Formats of the user's own, files elsewhere than on disk, and what other transforms load than mmcv's and mmseg's are
    left alone.

    Args:
        dataset: Its config, which :func:`~mmdyt.preflight.datasets.check_data` has passed.
        where: Its place in the config.
        classes: How many classes it has; None is unknown.
        room: How many classes the model tells apart; None is unknown.
        ignored: Labels that the model ignores.

    Returns:
        The data set, not read, if it is one of mmseg; otherwise None.

    Raises:
        ValueError: Naming the file.
    """
    masks = getattr(getattr(kind_of(dataset), 'load_data_list', None), '__module__', None) == MASKS
    if not masks and list_reader(dataset) != IMAGES:
        return None
    try:
        data = unread(dataset, IMAGES)
    except TypeError:  # a constructor of the user's own
        return None
    steps, own = _loaders(dataset)
    if masks:
        _check_reduce(data, steps, where)
    if steps and not any(is_remote(step) for step in [dataset, *dataset['pipeline']]):
        samples = data.load_data_list() if masks else _listed(data) if data.ann_file else _in_folders(data)
        seen = list(_read(_spread(samples), steps, where, check=not own))
        limit = max(classes, 2 if room == 2 else 0) if classes else room
        if limit and seen:
            _check_values(seen, len(samples), where, limit, {255, data.ignore_index, *ignored})
            if classes == 2 and not data.label_map and not data.reduce_zero_label:
                _check_second(seen, where)
    return data if masks else None


def ignored_labels(model) -> set[int]:
    """All labels that a model's config says to ignore."""
    if isinstance(model, list | tuple):
        return set().union(*map(ignored_labels, model))
    if not isinstance(model, Mapping):
        return set()
    own = {model['ignore_index']} if isinstance(model.get('ignore_index'), int) else set()
    return own.union(*map(ignored_labels, model.values()))


def _loaders(dataset: ConfigDict) -> tuple[list, bool]:
    """What loads images and masks, if it is the hosts' own, and whether the pipeline has steps of the user's own."""
    from mmcv.transforms import LoadAnnotations, LoadImageFromFile

    found, own = [], False
    for step in dataset.get('pipeline') or []:
        kind = step.get('type') if isinstance(step, Mapping) else type(step)
        with TRANSFORMS.switch_scope_and_registry(None) as registry:
            kind = registry.get(kind) if isinstance(kind, str) else kind
        here = getattr(kind, '__module__', '').partition('.')[0] in HOSTS
        own = own or not here
        if (
            here
            and isinstance(step, Mapping)
            and isinstance(kind, type)
            and issubclass(kind, LoadAnnotations | LoadImageFromFile)
        ):
            with warnings.catch_warnings():  # the run itself will give them
                warnings.simplefilter('ignore')
                found.append(TRANSFORMS.build(step))
    return (found if found and isinstance(found[0], LoadImageFromFile) else []), own


def _check_reduce(data, steps: list, where: str) -> None:
    """Refuse a data set and a loader of masks that take label zero for different things."""
    for step in steps:
        value = getattr(step, 'reduce_zero_label', None)
        if value is not None and value != data.reduce_zero_label:
            raise ValueError(
                f'{where}.reduce_zero_label must be that of {type(step).__name__} in its pipeline, {value}, '
                f'got {data.reduce_zero_label}.'
            )


def _spread(samples: list) -> list:
    """A few of the samples, the first and the last among them."""
    if len(samples) <= LOOK:
        return samples
    return [samples[i * (len(samples) - 1) // (LOOK - 1)] for i in range(LOOK)]


def _listed(data) -> list[dict]:
    """A few images of a list."""
    lines = image_lines(data.with_label)
    return [
        dict(img_path=os.path.join(data.img_prefix, lines.split(t)[0])) for t in _spread(list_from_file(data.ann_file))
    ]


def _in_folders(data) -> list[dict]:
    """The first image of a few class folders."""
    found = []
    for folder in _spread(class_folders(data.img_prefix)) if data.with_label else []:
        with os.scandir(Path(data.img_prefix, folder)) as entries:
            images = [entry.path for entry in entries if data.is_valid_file(entry.name) and entry.name[0] != '.']
        found += [dict(img_path=min(images))] if images else []
    return found


def _read(samples: list[dict], steps: list, where: str, check: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Load samples; of those with masks their files and labels."""
    start, turned = time.perf_counter(), False
    for sample in samples:
        results = dict(sample)
        for step in steps:
            if results is not None and (hasattr(step, 'color_type') or 'seg_map_path' in results):
                results = step(results)
        mask = (results or {}).get('gt_seg_map')
        if mask is not None and check:
            path = sample['seg_map_path']
            _check_form(path, mask)
            turned = turned or _warn_turned(sample['img_path'], mask, steps[0], where)
            yield path, np.unique(mask)
        if time.perf_counter() - start > SECONDS:
            return


def _check_form(path: str, mask: np.ndarray) -> None:
    """Refuse a mask of several channels, or of labels that mmseg would cut to 8 bits."""
    from PIL import Image

    if mask.ndim != 2:
        raise many_channels(path, mask)
    with Image.open(path) as image:
        if image.mode[:1] in WIDE and (largest := np.asarray(image).max()) > 255:
            raise ValueError(f'seg_map_path must name a mask with labels of at most 255, got {largest} in {path}.')


def _warn_turned(path: str, mask: np.ndarray, step, where: str) -> bool:
    """Say that an image is turned when it is loaded, where the size of its mask cannot tell whether it is, too."""
    orientation = exif_orientation(path)
    square = mask.shape[0] == mask.shape[1]
    if step.color_type not in ('color', 'grayscale') or not (orientation in (2, 3, 4) or orientation > 4 and square):
        return False
    warn(
        f'{where}: {path} is turned when it is loaded, by its EXIF orientation {orientation}. Its mask must be drawn '
        "on the turned image; if not, set color_type='color_ignore_orientation' of LoadImageFromFile."
    )
    return True


def _check_values(seen: list[tuple[str, np.ndarray]], number: int, where: str, limit: int, ignored: set[int]) -> None:
    """Refuse masks with labels that are no classes."""
    bad = [(path, [v for v in labels.tolist() if v >= limit and v not in ignored]) for path, labels in seen]
    bad = [(path, labels) for path, labels in bad if labels]
    if bad:
        path, labels = bad[0]
        raise ValueError(
            f'{where} must have masks with labels in [0, {limit}), its classes, or ignored ones {sorted(ignored)}, '
            f'got {labels[:3]} in {path} ({len(bad)} bad of {len(seen)} masks looked at, {number} in all).'
        )


def _check_second(seen: list[tuple[str, np.ndarray]], where: str) -> None:
    """Warn of black and white masks for two classes: white is ignored, and nothing but black learnt."""
    if set().union(*(labels.tolist() for _, labels in seen)) == {0, 255}:
        warn(
            f'{where}: all {len(seen)} masks looked at have labels 0 and 255, which is ignored, and none has 1, first '
            f'{seen[0][0]}.'
        )
