"""Data of one's own, as it lies in folders: what are the classes, and where are the samples?

Each reader gives what a config's ``own.`` names stand for, or refuses what is missing.
"""

import colorsys
import os
from collections.abc import Sequence
from pathlib import Path

from mmengine.fileio import list_from_file

from .lists import class_folders, video_lines

IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.ppm', '.pgm', '.tif', '.tiff', '.webp')
CLIPS = ('.mp4', '.avi', '.mkv', '.mov', '.mpeg', '.mpg', '.webm')
TRAIN, VAL = ('train', 'training'), ('val', 'validation', 'test')
MASKS = ('masks', 'annotations', 'labels')
NAMES = 'classes.txt'


def read_class_folders(root: Path, held_out: bool, endings: Sequence[str] = IMAGES) -> dict:
    """Files in class folders: ``train/CLASS/FILE`` and ``val/CLASS/FILE``; or ``CLASS/FILE`` where a share is held out.

    Args:
        root: The folder of the data.
        held_out: Whether a share of the training data is for validation.
        endings: Of the files that count.

    Raises:
        FileNotFoundError: If a folder is missing, or a class has no file.
        ValueError: If there are fewer than two classes, or both a folder and a share for validation.
    """
    train, val = _splits(root, held_out)
    names = class_folders(root / train)
    if len(names) < 2:
        raise ValueError(f'{root / train} must hold a folder of each class, at least 2, got {names or "none"}.')
    for name in names:
        number = _count(root / train / name, endings, 1 + held_out)
        if number < 1 + held_out:
            more = ', one of them to hold out' if held_out else ''
            raise FileNotFoundError(
                f'{root / train / name} must hold at least {1 + held_out} files{more}, that end with '
                f'{", ".join(endings)}, got {number}. Without any, take the folder away.'
            )
    return dict(names=names, train=train, val=val, endings=list(endings))


def read_clips(root: Path, held_out: bool) -> dict:
    """Clips in class folders, or in ``train.txt`` and ``val.txt`` with lines "path label" beside a ``classes.txt``.

    Paths of lists are relative to ``videos`` where the folder is there, else to the root.

    Raises:
        FileNotFoundError: If a folder or file is missing, or a class has no clip.
        ValueError: If there are too few classes, or both samples and a share for validation, or a clip is empty.
    """
    if not (root / 'train.txt').is_file():
        found = read_class_folders(root, held_out, CLIPS)
        for split in {found['train'], found['val']}:
            _check_full(root / split)
        return found | dict(dataset='mmdyt.ClipFolders', train_list='', val_list='')
    names = read_names(root)
    _check_val(root, 'val.txt', (root / 'val.txt').is_file(), held_out)
    labels = set()
    for line in list_from_file(str(root / 'train.txt')):
        labels |= {label for label in video_lines().split(line)[1] if label.isdecimal()}  # others are refused later
    empty = [name for label, name in enumerate(names) if f'{label}' not in labels]
    if empty:
        raise FileNotFoundError(f'{root / "train.txt"} must list a clip of each class of {NAMES}, got none of {empty}.')
    folder = 'videos' if (root / 'videos').is_dir() else ''
    lists = dict(train_list='train.txt', val_list='train.txt' if held_out else 'val.txt')
    return dict(dataset='mmdyt.ClipList', names=names, train=folder, val=folder, **lists)


def read_masks(root: Path, held_out: bool) -> dict:
    """``images/{train,val}``, ``masks/{train,val}`` and ``classes.txt``; without folders where a share is held out.

    Raises:
        FileNotFoundError: If a folder or file is missing, or an image has no mask, or a mask no image.
        ValueError: If files of a folder end in different ways, or there are both samples and a share for validation.
    """
    names = read_names(root)
    images = _one_of(root, ('images',), 'images')
    masks = _one_of(root, MASKS, 'masks')
    train, val = _splits(root / images, held_out)
    found = dict(names=names, palette=palette(len(names)))
    for split, name in (('train', train), ('val', val)):
        image_folder, mask_folder = root / images / name, root / masks / name
        if not mask_folder.is_dir():
            raise FileNotFoundError(f'{mask_folder} must be a folder with the masks of {image_folder}, got none.')
        number, ending, mask_ending = _check_pairs(image_folder, mask_folder)
        if held_out and number < 2:
            raise ValueError(f'{image_folder} must hold at least 2 images, one of them to hold out, got {number}.')
        found |= {f'{split}_images': os.path.join(images, name).rstrip('/'), f'{split}_ending': ending}
        found |= {f'{split}_masks': os.path.join(masks, name).rstrip('/'), f'{split}_mask_ending': mask_ending}
    return found


def read_names(root: Path) -> list[str]:
    """The names of classes in ``classes.txt``, one a line, in the order of their labels.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If there are fewer than two, or one stands there twice.
    """
    file = root / NAMES
    if not file.is_file():
        raise FileNotFoundError(f'{root} must hold {NAMES}: a name of a class a line, that of label 0 first; got none.')
    names = [line.strip() for line in file.read_text(encoding='utf-8-sig').splitlines()]
    while names and not names[-1]:
        names.pop()
    twice = sorted({name for name in names if names.count(name) > 1})
    if len(names) < 2 or twice or '' in names:
        got = f'{twice} twice' if twice else f'{names}'
        raise ValueError(f'{file} must name at least 2 classes, each once, one a line, got {got}.')
    return names


def palette(number: int) -> list[list[int]]:
    """Colours, red first, such that one is far from the next."""
    turns = [(i * 0.618) % 1 for i in range(number)]
    return [[round(255 * part) for part in colorsys.hsv_to_rgb(turn, 0.65, 0.9)] for turn in turns]


def _splits(root: Path, held_out: bool) -> tuple[str, str]:
    """Names of the folders for training and validation within a root; '' is the root itself."""
    train = next((name for name in TRAIN if (root / name).is_dir()), '')
    val = next((name for name in VAL if (root / name).is_dir()), None)
    if not train and not held_out:
        raise FileNotFoundError(
            f'{root} must hold the folders train and val, got no train. Where all samples lie in one folder, hold out '
            'a share of them: --cfg-options own.val=0.2'
        )
    _check_val(root, 'val', val is not None, held_out)
    return train, train if held_out else val


def _check_val(root: Path, name: str, there: bool, held_out: bool) -> None:
    """Refuse none, and two ways to validate."""
    if there and held_out:
        raise ValueError(f'own.val must be left out where {root} has {name} or the like, got a share to hold out.')
    if not there and not held_out:
        raise FileNotFoundError(
            f'{root} must hold {name}, got none. Or hold out a share of the training data: --cfg-options own.val=0.2'
        )


def _one_of(root: Path, names: Sequence[str], what: str) -> str:
    for name in names:
        if (root / name).is_dir():
            return name
    raise FileNotFoundError(f'{root} must hold a folder {" or ".join(names)} with the {what}, got none.')


def _check_pairs(images: Path, masks: Path) -> tuple[int, str, str]:
    """How many images there are, and the endings of images and masks; refuses any without a partner."""
    image_names, ending = _named_alike(images)
    mask_names, mask_ending = _named_alike(masks)
    for one, other, folder, what in (
        (image_names, mask_names, masks, 'a mask for each image'),
        (mask_names, image_names, images, 'an image for each mask'),
    ):
        if lonely := sorted(one - other):
            raise FileNotFoundError(f'{folder} must hold {what}, got none for {len(lonely)}, first {lonely[0]}.')
    return len(image_names), ending, mask_ending


def _named_alike(folder: Path) -> tuple[set[str], str]:
    """Names of the images in a folder and in those within it, without their ending, which must be one."""
    found = {}
    for file in sorted(folder.rglob('*')):
        name = file.relative_to(folder)
        if file.suffix.lower() in IMAGES and not any(part.startswith('.') for part in name.parts):
            found.setdefault(file.suffix, set()).add(str(name.with_suffix('')))
    if len(found) != 1:
        got = ' and '.join(f'{len(names)} of {ending}' for ending, names in found.items()) or 'none'
        raise ValueError(f'{folder} must hold images with one ending ({", ".join(IMAGES)}), got {got}.')
    ((ending, names),) = found.items()
    return names, ending


def _check_full(folder: Path) -> None:
    """Refuse empty clips; lists of clips are looked through in the same way later."""
    files = (file for file in folder.rglob('*') if file.suffix.lower() in CLIPS and file.name[0] != '.')
    clips = [file for file in files if file.is_file()]
    empty = sorted(str(file) for file in clips if not file.stat().st_size)
    if empty:
        raise ValueError(f'{folder} must hold no empty clip, got {len(empty)} of {len(clips)}, first {empty[0]}.')


def _count(folder: Path, endings: Sequence[str], enough: int) -> int:
    """How many files there are in a folder and in those within it; stops at enough."""
    number = 0
    for _, _, files in os.walk(folder, followlinks=True):
        number += sum(file.lower().endswith(tuple(endings)) and file[0] != '.' for file in files)
        if number >= enough:
            break
    return min(number, enough)
