"""Let mmengine read and write ``.safetensors``, and load tuned-only files upon their base.

Part of :mod:`mmdyt.compat`; nothing happens on import.
"""

import importlib
import os
from functools import wraps

PATTERN = r'(?!\w+://).*\.safetensors$'  # of files; addresses are left to mmengine


def install() -> None:
    """Mend mmengine's functions for checkpoints. Calling it again changes nothing."""
    checkpoint = importlib.import_module('mmengine.runner.checkpoint')
    if hasattr(checkpoint.save_checkpoint, 'writes_safetensors'):
        return
    checkpoint.CheckpointLoader.register_scheme(PATTERN, load_from_safetensors, force=True)
    # sorted by name, mmengine asks the empty scheme of local files last
    save, load = _saving(checkpoint.save_checkpoint), _completing(checkpoint._load_checkpoint_to_model)
    for name in ('mmengine.runner.checkpoint', 'mmengine.runner.runner', 'mmengine.runner'):
        module = importlib.import_module(name)
        for attribute, mended in (('save_checkpoint', save), ('_load_checkpoint_to_model', load)):
            if hasattr(module, attribute):
                setattr(module, attribute, mended)


def load_from_safetensors(filename: str, map_location=None) -> dict:
    """Read a file, as mmengine's loaders of other kinds do."""
    from mmdyt.tuned.file import read

    path = os.path.expanduser(filename)
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{filename} can not be found.')
    return read(path)


def _saving(save):
    """Wrap ``save_checkpoint``."""

    @wraps(save)
    def saved(checkpoint, filename, *args, **options):
        from mmdyt.tuned.file import SUFFIX, write

        if not str(filename).endswith(SUFFIX):
            return save(checkpoint, filename, *args, **options)
        return write(checkpoint, filename)

    saved.writes_safetensors = True
    return saved


def _completing(load):
    """Wrap what puts a checkpoint into a model: the base is not in a tuned-only file."""

    @wraps(load)
    def loaded(model, checkpoint, *args, **options):
        if isinstance(checkpoint, dict) and 'tuned' in checkpoint:
            from mmdyt.tuned.model import complete

            checkpoint['state_dict'] = complete(model, checkpoint)
        return load(model, checkpoint, *args, **options)

    return loaded
