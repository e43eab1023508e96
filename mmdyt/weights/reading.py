"""Read a file of weights, or the parts that an index names, without running any code that they may hold."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

SUFFIXES = ('.pth', '.pt', '.bin', '.pth.tar', '.safetensors')
INDEX = '.index.json'  # of shards: names of tensors to names of files
# the entries that hold the weights of a checkpoint; where a teacher stands beside a student, it is the result
WRAPPERS = ('teacher', 'model', 'state_dict', 'model_ema', 'module')
# what a copy of the model within another puts in front of all names
FRONTS = ('module.', '_orig_mod.')


def check_source(src: Path) -> None:
    """Refuse a path that cannot hold weights.

    Raises:
        ValueError: Naming it.
    """
    if not src.is_file():
        raise ValueError(f'SRC must be a file, got {str(src)!r}, which is none.')
    if not src.name.endswith((*SUFFIXES, INDEX)):
        raise ValueError(f'SRC must end in {", ".join(SUFFIXES)} or {INDEX}, got {src.name!r}.')


def read(src: Path) -> object:
    """What a file holds, or the tensors of all shards of an index.

    Raises:
        ValueError: If it is damaged, holds more than tensors and plain values, or lacks a shard.
    """
    return _read_shards(src) if src.name.endswith(INDEX) else _read_file(src)


def read_json(file: Path) -> dict:
    """The entries of a JSON file; none where it is missing, damaged, or no dict."""
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_file(src: Path) -> object:
    try:
        if src.suffix == '.safetensors':
            from safetensors.torch import load_file

            return load_file(src)
        # options of a command, which DINO, MAE and MoCo v3 save: a class without any code of its own
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(src, map_location='cpu', weights_only=True)
    except ImportError as error:
        raise ValueError(
            f'SRC must be readable, got {src.name!r} without the package safetensors. Run pip install safetensors.'
        ) from error
    except Exception as error:  # damaged files raise almost anything
        script = 'TorchScript' in str(error)
        remedy = (
            'It is a TorchScript archive, as OpenAI published CLIP: save the state_dict() of the model that clip.load '
            'or open_clip.create_model returns.'
            if script
            else 'Pickled objects can run code, so they are refused: ask its publisher for the bare state_dict, or '
            'fetch a damaged file again.'
        )
        raise ValueError(
            f'SRC must hold tensors only, got {src.name!r}, which does not load safely ({type(error).__name__}). '
            + remedy
        ) from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = read_json(index).get('weight_map')
    if not isinstance(places, Mapping) or not places:
        raise ValueError(f"SRC must hold a 'weight_map' of tensors to files, got {index.name!r} without one.")
    for name in set(map(str, places.values())):
        shard = index.with_name(Path(name).name)
        if Path(name).name != name or not name.endswith(SUFFIXES):
            raise ValueError(f'{index.name} must name files beside itself, got {name!r}.')
        if not shard.is_file():
            raise ValueError(f'{index.name} must have all its shards beside it, got none named {name!r}.')
    tensors = {}
    for name in sorted(set(places.values())):
        shard = _read_file(index.with_name(name))
        wanted = [tensor for tensor, file in places.items() if file == name]
        missing = [tensor for tensor in wanted if not isinstance(shard, Mapping) or tensor not in shard]
        if missing:
            raise ValueError(f'{name} must hold {missing[0]!r} by {index.name}, got a file without it.')
        tensors |= {tensor: shard[tensor] for tensor in wanted}
    return tensors


def unwrap(checkpoint: object) -> tuple[dict[str, object], dict[str, str]]:
    """Take the state dict out of ``{'model': ...}`` and the like, and off what stands in front of all names.

    Returns:
        The tensors by name; what was left out, name to reason.

    Raises:
        ValueError: If there is none.
    """
    left_out = {}
    for _ in range(3):  # bounded: a pickled dict may hold itself
        inner = checkpoint if isinstance(checkpoint, Mapping) else {}
        key = next((k for k in WRAPPERS if isinstance(inner.get(k), Mapping)), None)
        if key is None:
            break
        left_out.update({str(k): f'stands beside {key!r}, which is taken' for k in checkpoint if k != key})
        checkpoint = checkpoint[key]
    if not isinstance(checkpoint, Mapping) or not all(isinstance(k, str) for k in checkpoint):
        raise ValueError(
            f'SRC must hold a state dict (names to tensors), got a {type(checkpoint).__name__}. '
            'Save model.state_dict() instead.'
        )
    for front in FRONTS:
        if checkpoint and all(k.startswith(front) for k in checkpoint):
            checkpoint = {k.removeprefix(front): v for k, v in checkpoint.items()}
    return dict(checkpoint), left_out
