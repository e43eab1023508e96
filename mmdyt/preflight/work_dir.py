"""Is the work dir this run's own?"""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from mmengine.config import Config

from mmdyt.files import hold

RANKS = dict(pytorch='RANK', slurm='SLURM_PROCID', mpi='OMPI_COMM_WORLD_RANK')


def check_folder(name: str, path: str) -> None:
    """Refuse a folder that cannot be written to, or made.

    Args:
        name: Of the argument, for the message.
        path: What the user typed.

    Raises:
        ValueError: If it is a file, lies below one, or must not be written to.
    """
    folder = Path(path).absolute()
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise ValueError(f'{name} must be a folder, got {path}: {there} is none.')
    if not os.access(there, os.W_OK):
        raise ValueError(f'{name} must be a folder that can be written to, got {path}: no permission.')


def hold_work_dir(cfg: Config) -> AbstractContextManager:
    """Hold the work dir against a second run until the context ends; the processes of one run share it.

    Raises:
        ValueError: If another run is going on there.
    """
    if os.environ.get(RANKS.get(cfg.launcher, ''), '0') != '0':
        return nullcontext()
    try:
        return hold(Path(cfg.work_dir))
    except BlockingIOError as error:
        raise ValueError(
            f'--work-dir must be that of no other run that is going on, got {cfg.work_dir}: {error} '
            'Wait for it, or name another folder.'
        ) from error
