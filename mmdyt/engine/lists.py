"""Are the samples of a classification data set usable, as a list of "path label" or class folders name them?"""

import os
from pathlib import Path

from mmengine.fileio import list_from_file

BOM = '\ufeff'


def check_list(
    file: str, folder: str, where: str, num_classes: int | None = None, *, labels: bool = True, images: bool = True
) -> None:
    """Refuse a list with a line that training would stumble over; no image is opened.

    Lines are read as mmpretrain's ``CustomDataset`` reads them: the label stands behind the last space, and a blank
    line is no sample but an error.

    Args:
        file: The list, one sample a line.
        folder: What the paths of the list are relative to.
        where: Path of the data set in the config, for the message.
        num_classes: Labels lie below it; None leaves their range open.
        labels: Whether lines are "path label", not only "path".
        images: Whether the paths must exist.

    Raises:
        ValueError: Naming how many lines are bad, and the first.
    """
    lines = _read(file, where)
    if not lines:
        raise ValueError(f'{where}.ann_file must list at least one sample, got an empty file, {file}.')
    folders: dict[str, set[str]] = {}
    count, first = 0, ''
    for number, line in enumerate(lines, 1):
        path, problem = _split(line, num_classes) if labels else (line, '' if line else 'it is blank')
        if not problem and images and not _exists(folder, path, folders):
            bom = ': save the list without its byte order mark' if path.startswith(BOM) else ''
            problem = f'there is no file {os.path.join(folder, path)!r}{bom}'
        if problem:
            count += 1
            first = first or f'{file}, line {number}: {problem}'
    if count:
        form = 'path label' if labels else 'path'
        raise ValueError(
            f'{where}.ann_file must have a line "{form}" for each sample, got {count} bad of {len(lines)} lines, '
            f'first {first}.'
        )


def check_class_folders(folder: str, where: str, num_classes: int | None = None) -> None:
    """Refuse a folder whose sub-folders, one a class, are none or more than the head's classes.

    Args:
        folder: What holds them. Hidden ones count: mmpretrain takes them for classes, too.
        where: Path of the data set in the config, for the message.
        num_classes: The most there may be; None is any number.

    Raises:
        ValueError: Naming how many there are.
    """
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not classes:
        raise ValueError(f'{where} must have a folder for each class in {folder}, got none. Or set its ann_file.')
    if num_classes is not None and len(classes) > num_classes:
        raise ValueError(
            f'{where} must have at most {num_classes} class folders, the classes of the head, '
            f'got {len(classes)} in {folder}, first {classes[:3]}. Set num_classes of the head to their number.'
        )


def _read(file: str, where: str) -> list[str]:
    """Lines of a text, without their ends of any style."""
    try:
        return list_from_file(file)
    except UnicodeDecodeError as error:
        line = Path(file).read_bytes()[: error.start].count(b'\n') + 1
        raise ValueError(f'{where}.ann_file must be UTF-8 text, got other bytes in {file}, line {line}.') from error


def _split(line: str, num_classes: int | None) -> tuple[str, str]:
    """The path of a line ``path label``, and what is wrong with the line or its label: nothing, if all is well."""
    path, space, label = line.strip().rpartition(' ')
    if not space:
        return '', 'it is blank' if not label else f'{label[:100]!r} has no space between path and label'
    try:
        number = int(label)
    except ValueError:
        return path, f'label {label[:100]!r} is no integer'
    if num_classes is not None and not 0 <= number < num_classes:
        return path, f'label {number} lies outside [0, {num_classes}), the classes of the head'
    return path, ''


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
