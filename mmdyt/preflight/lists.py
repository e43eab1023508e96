"""Are the samples of a classification data set, images or videos, usable as a list or class folders name them?"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mmengine.fileio import list_from_file

BOM = '\ufeff'


class LineFormat(NamedTuple):
    """How a data set reads a line of its list; to every one of them a blank line is no sample but an error.

    Args:
        form: A line in words, for messages.
        split: What parts a line into its path, its labels as they stand there, and what is wrong with it, or nothing.
        video: Whether the files are videos: a path without ending may lack an ``.mp4``, and an empty file is an error.
    """

    form: str
    split: Callable[[str], tuple[str, list[str], str]]
    video: bool = False


def image_lines(labels: bool = True) -> LineFormat:
    """Lines as mmpretrain's ``CustomDataset`` reads them: the label stands behind the last space.

    Args:
        labels: Whether lines are "path label", not only "path".
    """
    return LineFormat('path label', _split_last) if labels else LineFormat('path', _split_none)


def video_lines(delimiter: str | None = ' ', several: bool = False) -> LineFormat:
    """Lines as mmaction's ``VideoDataset`` reads them, but a line without label is an error: it would be label -1.

    Args:
        delimiter: What stands between path and label, and nowhere else; None is any white space.
        several: Whether a line may have more labels than one.
    """
    mark = {' ': 'space', None: 'white space'}.get(delimiter, repr(delimiter))

    def split(line: str) -> tuple[str, list[str], str]:
        line = line.strip()
        path, *labels = line.split(delimiter) if line else ['']
        if not labels:
            return path, labels, f'{line[:100]!r} has no {mark} between path and label' if line else 'it is blank'
        if len(labels) > 1 and not several:
            return path, labels, f'{line[:100]!r} has a {mark} elsewhere than between path and label'
        return path, labels, ''

    form = (' ' if delimiter is None else delimiter).join(['path', 'label', 'label ...'][: 2 + several])
    return LineFormat(form, split, video=True)


def check_list(
    file: str,
    folder: str,
    where: str,
    num_classes: int | None = None,
    *,
    lines: LineFormat | None = None,
    files: bool = True,
) -> None:
    """Refuse a list with a line that training would stumble over; no image or video is opened.

    Args:
        file: The list, one sample a line.
        folder: What the paths of the list are relative to.
        where: Path of the data set in the config, for the message.
        num_classes: Labels lie below it; None leaves their range open.
        lines: How they are read; None is :func:`image_lines`.
        files: Whether the paths must exist.

    Raises:
        ValueError: Naming how many lines are bad, and the first.
    """
    lines = lines or image_lines()
    texts = _read(file, where)
    if not texts:
        raise ValueError(f'{where}.ann_file must list at least one sample, got an empty file, {file}.')
    folders: dict[str, set[str]] = {}
    count, first = 0, ''
    for number, text in enumerate(texts, 1):
        path, labels, problem = lines.split(text)
        problem = problem or _wrong_label(labels, num_classes)
        if not problem and files:
            problem = _wrong_file(folder, path, folders, lines.video)
        if problem:
            count += 1
            first = first or f'{file}, line {number}: {problem}'
    if count:
        raise ValueError(
            f'{where}.ann_file must have a line "{lines.form}" for each sample, got {count} bad of {len(texts)} lines, '
            f'first {first}.'
        )


def check_class_folders(folder: str, where: str, num_classes: int | None = None) -> None:
    """Refuse a folder whose sub-folders, one a class, are none or more than the head's classes.

    Args:
        folder: What holds them; hidden ones are none, see ``mmdyt/compat/loading.py``.
        where: Path of the data set in the config, for the message.
        num_classes: The most there may be; None is any number.

    Raises:
        ValueError: Naming how many there are.
    """
    classes = class_folders(folder)
    if not classes:
        raise ValueError(f'{where} must have a folder for each class in {folder}, got none. Or set its ann_file.')
    if num_classes is not None and len(classes) > num_classes:
        raise ValueError(
            f'{where} must have at most {num_classes} class folders, the classes of the head, '
            f'got {len(classes)} in {folder}, first {classes[:3]}. Set num_classes of the head to their number.'
        )


def class_folders(folder: str) -> list[str]:
    """Names of the folders that are classes, in the order of their labels."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith('.'))


def _read(file: str, where: str) -> list[str]:
    """Lines of a text, without their ends of any style."""
    try:
        return list_from_file(file)
    except UnicodeDecodeError as error:
        line = Path(file).read_bytes()[: error.start].count(b'\n') + 1
        raise ValueError(f'{where}.ann_file must be UTF-8 text, got other bytes in {file}, line {line}.') from error


def _split_last(line: str) -> tuple[str, list[str], str]:
    """A line ``path label``, of which the path may have spaces."""
    path, space, label = line.strip().rpartition(' ')
    if space:
        return path, [label], ''
    return '', [], f'{label[:100]!r} has no space between path and label' if label else 'it is blank'


def _split_none(line: str) -> tuple[str, list[str], str]:
    """A line that is all path."""
    return line, [], '' if line else 'it is blank'


def _wrong_label(labels: list[str], num_classes: int | None) -> str:
    """What is wrong with the first wrong label; nothing, if all are right."""
    for label in labels:
        try:
            number = int(label)
        except ValueError:
            return f'label {label[:100]!r} is no integer'
        if num_classes is not None and not 0 <= number < num_classes:
            return f'label {number} lies outside [0, {num_classes}), the classes of the head'
    return ''


def _wrong_file(root: str, path: str, folders: dict[str, set[str]], video: bool) -> str:
    """What is wrong with the file of a sample; nothing, if it is there and, where it is a video, not empty."""
    names = [path, f'{path}.mp4'] if video and not os.path.splitext(path)[1] else [path]
    there = next((name for name in names if _exists(root, name, folders)), None)
    if there is None:
        bom = ': save the list without its byte order mark' if path.startswith(BOM) else ''
        return f'there is no file {os.path.join(root, path)!r}{bom}'
    if video and not os.path.getsize(os.path.join(root, there)):
        return f'the file {os.path.join(root, there)!r} is empty'
    return ''


def _exists(root: str, path: str, folders: dict[str, set[str]]) -> bool:
    """Whether ``path`` below ``root`` is a file; ``folders`` keeps the files of each folder, which is read once."""
    folder, slash, name = path.rpartition('/')
    if folder + slash not in folders:
        folders[folder + slash] = _files(os.path.join(root, folder + slash))
    # a name may be spelt in another way than the folder does: .., or case on some systems
    return name in folders[folder + slash] or os.path.isfile(os.path.join(root, path))


def _files(folder: str) -> set[str]:
    """Names of the files in a folder; none where it cannot be read."""
    try:
        with os.scandir(folder or '.') as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()
