"""The ``.safetensors`` file of what was tuned: tensors, and all that is said about them as JSON in its header."""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from mmdyt.files import whole_file

SUFFIX = '.safetensors'
KEY = 'mmdyt'  # of the JSON in the header
VERSION = 1
STATE = 'training_state'  # a tensor of bytes, as torch.save writes what resuming needs
WEIGHTS = ('meta', 'state_dict', 'tuned')  # of a checkpoint: all else is the state of training


def write(checkpoint: Mapping, path: str | Path) -> None:
    """Write a checkpoint as ``.safetensors``; whatever goes wrong, the file is whole or the old one.

    Args:
        checkpoint: ``state_dict`` and, as far as they are there, ``meta``, ``tuned`` (of
            :func:`mmdyt.tuned.model.tuned_only`) and the state of training. That is kept where there is an
            ``optimizer``; without one nobody can resume.
        path: Of the file.

    Raises:
        ValueError: If the package safetensors is missing.
        OSError: If the file cannot be written.
    """
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in checkpoint['state_dict'].items()}
    state = {key: value for key, value in checkpoint.items() if key not in WEIGHTS}
    if 'optimizer' in state:
        with io.BytesIO() as stream:
            torch.save(state, stream)
            tensors[STATE] = torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)
    about = dict(version=VERSION, content=_hash(tensors), tuned=checkpoint.get('tuned'))
    about |= dict(meta=checkpoint.get('meta') or {})
    header = {'format': 'pt', KEY: json.dumps(about, default=_plain)}
    content = _safetensors().torch.save(tensors, header)
    with whole_file(path, 'wb') as file:
        file.write(content)


def read(path: str | Path) -> dict:
    """A checkpoint on the CPU, as :func:`write` was given it.

    A ``.safetensors`` of others has ``state_dict`` only. No code of the file is run.

    Raises:
        ValueError: If the file is of a later version, its tensors are not those that were written, or the package
            safetensors is missing.
    """
    with _safetensors().safe_open(str(path), framework='pt') as file:
        about = _about(file.metadata(), path)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    if about and _hash(tensors) != about['content']:
        raise ValueError(f'checkpoint must hold what was written, got other tensors in {path}.')
    state = tensors.pop(STATE, None) if about else None
    found = dict(state_dict=tensors)
    if about:
        found |= dict(meta=about['meta'])
    if about.get('tuned'):
        found |= dict(tuned=about['tuned'] | dict(file=str(path)))
    if state is not None:
        found |= torch.load(io.BytesIO(state.numpy().tobytes()), map_location='cpu', weights_only=True)
    return found


def is_whole(path: str | Path) -> bool:
    """Whether the file is as long as its header says, so that it was not cut short."""
    try:
        with open(path, 'rb') as file:
            length = int.from_bytes(file.read(8), 'little')
            header = json.loads(file.read(min(length, 100_000_000)))
        end = max((t['data_offsets'][1] for name, t in header.items() if name != '__metadata__'), default=0)
        return Path(path).stat().st_size == 8 + length + end
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _about(metadata: Mapping | None, path: str | Path) -> dict:
    """What the header says; nothing where the file is of others."""
    text = (metadata or {}).get(KEY)
    if text is None:
        return {}
    about = json.loads(text)
    if about.get('version') != VERSION:
        raise ValueError(f'checkpoint must be of version {VERSION}, got {about.get("version")!r} in {path}.')
    return about


def _hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of all tensors, bit for bit."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f'{name} {tensors[name].dtype} {tuple(tensors[name].shape)}'.encode())
        found.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _plain(value):
    """What JSON does not know, as plain values."""
    return value.tolist() if hasattr(value, 'tolist') else str(value)


def _safetensors():
    """The package, with its part for torch."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ValueError(
            'checkpoint must be a .pth without the package safetensors, got a .safetensors. '
            "`pip install 'mmdyt[convert]'`"
        ) from error
    return safetensors
