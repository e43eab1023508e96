"""Repairs for how mmengine saves: in place, and only after an older checkpoint is gone.

Part of :mod:`mmdyt.compat`; nothing happens on import.
"""

import importlib
import os
from functools import wraps
from types import SimpleNamespace

from mmdyt.files import whole_file

PICTURES = '.png', '.jpg', '.jpeg'  # thousands may be painted, and painted again


def install() -> None:
    """Let what mmengine writes be there wholly or not at all. Calling it again changes nothing."""
    for name in ('fileio.backends.local_backend', 'hooks.checkpoint_hook', 'config.config'):
        # checkpoints, dumped predictions, metrics, painted pictures; last_checkpoint; the config
        importlib.import_module(f'mmengine.{name}').open = open_whole
    _write_pictures_whole()
    hook = importlib.import_module('mmengine.hooks').CheckpointHook
    for name in ('_save_checkpoint_with_step', '_save_best_checkpoint'):
        if not hasattr(getattr(hook, name), '__wrapped__'):
            setattr(hook, name, _removing_last(getattr(hook, name)))
    if not hasattr(hook.before_train, '__wrapped__'):
        hook.before_train = _own_best_checkpoint(hook.before_train)


def open_whole(file, mode: str = 'r', **options):
    """Stand in for ``open``: what is written anew takes the place of the old file once it is whole."""
    if 'w' not in mode or not isinstance(file, str | os.PathLike):
        return open(file, mode, **options)
    return whole_file(file, mode, sync=not str(file).endswith(PICTURES), **options)


def _write_pictures_whole() -> None:
    """Let mmengine's visualizer say where it could not write a picture; OpenCV does not."""
    backend = importlib.import_module('mmengine.visualization.vis_backend')
    if isinstance(backend.cv2, SimpleNamespace):
        return
    cv2 = backend.cv2

    def imwrite(path: str, picture) -> bool:
        with open_whole(path, 'wb') as stream:
            stream.write(cv2.imencode(os.path.splitext(path)[1], picture)[1])
        return True

    backend.cv2 = SimpleNamespace(**{**vars(cv2), 'imwrite': imwrite})


def _removing_last(save):
    """Let a method of CheckpointHook remove older checkpoints after it has saved the new one, of its own folder only.

    mmengine removes first: with ``max_keep_ckpts=1`` or ``save_best`` a full disk, or the end of the process, leaves
    none. And a run that goes on in a copied folder would remove the best checkpoint of the folder it was copied from.
    """

    @wraps(save)
    def saved(self, *args, **kwargs):
        if not hasattr(self, 'file_backend'):  # before training, which makes it: nothing is to be removed
            return save(self, *args, **kwargs)
        backend, later = self.file_backend, []
        self.file_backend = SimpleNamespace(
            join_path=backend.join_path,
            isfile=backend.isfile,
            isdir=backend.isdir,
            remove=lambda path: later.append((backend.remove, path)),
            rmtree=lambda path: later.append((backend.rmtree, path)),
        )
        try:
            result = save(self, *args, **kwargs)
        finally:
            self.file_backend = backend
        best = getattr(self, 'best_ckpt_path_dict', {}).values()
        new = {os.path.abspath(path) for path in (self.last_ckpt, getattr(self, 'best_ckpt_path', None), *best) if path}
        for remove, path in later:
            own = os.path.abspath(os.path.dirname(path)) == os.path.abspath(self.out_dir)
            if own and os.path.abspath(path) not in new:
                remove(path)
        return result

    return saved


def _own_best_checkpoint(before_train):
    """Let a run that goes on in a moved or copied folder find its best checkpoint there."""

    def moved(self, path: str | None) -> str | None:
        here = path and os.path.join(self.out_dir, os.path.basename(path))
        return here if here and os.path.isfile(here) else path

    @wraps(before_train)
    def prepared(self, runner):
        before_train(self, runner)
        if getattr(self, 'best_ckpt_path', None):
            self.best_ckpt_path = moved(self, self.best_ckpt_path)
        for name, path in getattr(self, 'best_ckpt_path_dict', {}).items():
            self.best_ckpt_path_dict[name] = moved(self, path)

    return prepared
