"""Ways to spoil or to complicate what lies on the disk. Each takes the folder of a world."""

import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch

from mmdyt import compat


def named(name: str, change: Callable[[Path], None]) -> Callable[[Path], None]:
    """A change with a name for the report."""
    change.__name__ = name
    return change


def content(file: str, data: bytes | str) -> Callable[[Path], None]:
    """Give a file this content."""
    data = data.encode() if isinstance(data, str) else data

    def change(here: Path) -> None:
        (here / file).parent.mkdir(parents=True, exist_ok=True)
        (here / file).write_bytes(data)

    return named(f'{file} = {data[:16]!r}', change)


def cut(file: str, share: float) -> Callable[[Path], None]:
    """Keep the first bytes of a file."""

    def change(here: Path) -> None:
        data = (here / file).read_bytes()
        (here / file).write_bytes(data[: int(len(data) * share)])

    return named(f'{file} cut at {share}', change)


def remove(path: str) -> Callable[[Path], None]:
    """Delete a file or folder."""

    def change(here: Path) -> None:
        shutil.rmtree(here / path) if (here / path).is_dir() else (here / path).unlink()

    return named(f'no {path}', change)


def rename(old: str, new: str) -> Callable[[Path], None]:
    """Move a file or folder."""

    def change(here: Path) -> None:
        (here / new).parent.mkdir(parents=True, exist_ok=True)
        (here / old).rename(here / new)

    return named(f'{old} -> {new}', change)


def replace(file: str, old: str, new: str) -> Callable[[Path], None]:
    """Replace text in a file; it must be there."""

    def change(here: Path) -> None:
        text = (here / file).read_text()
        assert old in text, f'{old!r} is not in {file}'
        (here / file).write_text(text.replace(old, new))

    return named(f'{file}: {old!r} -> {new!r}', change)


def append(file: str, text: str) -> Callable[[Path], None]:
    """Add text to a file."""

    def change(here: Path) -> None:
        with (here / file).open('a') as stream:
            stream.write(text)

    return named(f'{file} + {text[:40]!r}', change)


def image(file: str, shape: tuple[int, ...], value: int = 90, dtype=np.uint8) -> Callable[[Path], None]:
    """Write an image of one value."""

    def change(here: Path) -> None:
        (here / file).parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(here / file), np.full(shape, value, dtype))

    return named(f'{file} of {shape} {np.dtype(dtype).name}, {value}', change)


def checkpoint(name: str, change: Callable[[dict], object], file: str = 'run/last.pth') -> Callable[[Path], None]:
    """Change what a checkpoint holds; ``change`` returns what is saved, or None for what it was given."""

    def apply(here: Path) -> None:
        path = here / file
        compat.install()  # torch's safety knows what mmengine keeps in a checkpoint
        found = torch.load(path, weights_only=True)
        result = change(found)
        torch.save(found if result is None else result, path)

    return named(name, apply)


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    """One change after the other."""

    def apply(here: Path) -> None:
        for change in changes:
            change(here)

    return named(', '.join(change.__name__ for change in changes), apply)
