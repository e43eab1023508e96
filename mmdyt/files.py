"""Write a file so that it is there wholly or not at all; hold a folder against a second process."""

import errno
import json
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = '.lock'

NOT_WRITABLE = 'file must be writable'


class BadFileError(ValueError):
    """A file of a data set that cannot be what it should be; the message names it."""


@contextmanager
def whole_path(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """A name beside ``path`` to write to; once the block has ended well it takes that file's place.

    Whatever goes wrong, a full disk, say, or the end of the process, the file that was there before stays as it was.
    The name is of this call alone and has the suffix of ``path``. Links stay links; pipes and devices are written as
    they are.

    Args:
        path: Of the file.
        sync: Wait until the disk has it, so that it is whole also where the machine goes down. Takes milliseconds,
            which thousands of files that are easily made again are not worth.

    Raises:
        OSError: Naming ``path``, if it cannot be written.
    """
    target = Path(path).resolve()
    part = target.with_name(f'.{os.getpid()}.{secrets.token_hex(4)}{target.suffix}')
    try:
        if target.exists() and not (target.is_file() or target.is_dir()):
            yield Path(path)
            return
        _check_replaceable(target)
        yield part
        if target.exists():
            with suppress(OSError):  # some file systems have no modes
                shutil.copymode(target, part)
        if sync:
            _to_disk(part)
        os.replace(part, target)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(part), str(target), str(path)):
            raise  # of another file, or of none
        named = type(error)(f'{NOT_WRITABLE}, got {path}: {error.strerror or error}.')
        named.errno = error.errno
        raise named from error
    finally:
        with suppress(OSError):  # what went wrong is said already
            part.unlink()


@contextmanager
def whole_file(path: str | Path, mode: str = 'w', sync: bool = True, **options) -> Iterator[IO]:
    """Open a file to write it as :func:`whole_path` does; text is UTF-8.

    Args:
        path: Of the file.
        mode: ``'w'`` or ``'wb'``.
        sync: Of :func:`whole_path`.
        options: More of those of ``open``.
    """
    if 'b' not in mode:
        options.setdefault('encoding', 'utf-8')
    with whole_path(path, sync) as part, open(part, mode, **options) as stream:
        yield stream


def write_text(file: str | Path, text: str) -> None:
    """Write a file so that it is there wholly or not at all."""
    with whole_file(file) as stream:
        stream.write(text)


def write_json(file: str | Path, content) -> None:
    """Write a file so that it is there wholly or not at all, also where the machine goes down meanwhile."""
    write_text(file, json.dumps(content, indent=1, allow_nan=False) + '\n')


def check_out_file(name: str, path: str | Path) -> None:
    """Refuse what :func:`whole_path` could not write, before there is something to write.

    Args:
        name: Of the argument, for the message.
        path: What the user typed.

    Raises:
        ValueError: If it is a folder, if it lies in none, or if it may not be written.
    """
    target = Path(path).resolve()
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f'{name} must name a file in an existing folder, got {path}.')
    try:
        _check_replaceable(target)
    except OSError as error:
        raise ValueError(f'{name} must name a file that can be written, got {path}: {error.strerror}.') from error


def hold(folder: Path, name: str = LOCK) -> AbstractContextManager:
    """Hold a folder against other processes until the returned context ends, or the process does, however it does.

    A folder that cannot be locked, because it is read-only or on a file system without locks, is not held; a line says
    so.

    Args:
        folder: Is made where it is missing.
        name: Of the file in it that is locked. It stays, and says who holds the folder or was the last to.

    Raises:
        BlockingIOError: If another process holds it; names that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    try:
        stream = file.open('a+', encoding='utf-8')
    except OSError as error:
        return _unheld(folder, error)
    try:
        # not flock: workers of data loaders would inherit that lock, and outlive a killed run by seconds
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        stream.seek(0)
        owner = stream.read().strip() or 'another process'
        stream.close()
        raise BlockingIOError(f'{folder} is in use by {owner}.') from error
    except (OSError, AttributeError) as error:
        stream.close()
        return _unheld(folder, error)
    stream.truncate(0)
    stream.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    stream.flush()
    return stream


def _unheld(folder: Path, error: Exception) -> AbstractContextManager:
    print(f'warning: {folder} cannot be locked ({error}): see to it that no second run writes there.', file=sys.stderr)
    return nullcontext()


def _check_replaceable(target: Path) -> None:
    """Raise what writing over a file would, although renaming could do it."""
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, 'it is a folder', str(target))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, 'its folder is missing', str(target))
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise PermissionError(errno.EACCES, 'no permission', str(target))


def _to_disk(file: Path) -> None:
    """Have all of a file on the disk before it takes its name: else a crash of the machine may leave it empty."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(handle)
