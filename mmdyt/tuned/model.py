"""What of a model was tuned, and how a model comes back from that and its base."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn as nn
from mmengine.model import BaseTTAModel
from mmengine.runner import CheckpointLoader
from torch import Tensor

from mmdyt.core.options import is_number
from mmdyt.core.part import Part, parts

from .fingerprint import compare, fingerprint, name_of_base

SHOWN = 3  # kinds of parts in a message


def tuned_only(model: nn.Module, checkpoint: Mapping) -> dict:
    """A checkpoint without what its base gives.

    Left out are frozen tensors, of no part, that the model's pre-trained base (the ``init_cfg`` of its modules) holds
    with the very same values. So positions that were resized, or a norm that the base lacks, stay in.

    Args:
        model: Of the checkpoint, without a wrapper; only its names, its parts and what is frozen are used.
        checkpoint: With the ``state_dict`` of all of it.

    Returns:
        The same, with fewer tensors in ``state_dict``, and ``tuned``: method, fingerprint of the base, input.
    """
    state, base, kept = checkpoint['state_dict'], dict(base_tensors(model)), kept_names(model)
    left = {name: t for name, t in state.items() if name not in kept and name in base and _equal(t, base[name])}
    hashes = fingerprint(left)
    about = dict(
        method=methods(model),
        base=dict(files=base_files(model), name=name_of_base(hashes), tensors=hashes),
        input=_input(model),
    )
    rest = {name: tensor for name, tensor in state.items() if name not in left}
    return {**checkpoint, 'state_dict': rest, 'tuned': about}


def kept_names(model: nn.Module) -> set[str]:
    """Names in the state of a model that no base can give: what is trained, and all of the parts."""
    inside = tuple(f'{name}.' for name, module in model.named_modules() if isinstance(module, Part))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained | {name for name in model.state_dict() if inside and name.startswith(inside)}


def complete(model: nn.Module, checkpoint: Mapping) -> dict[str, Tensor]:
    """All tensors of a model: those that were tuned, and those of its base.

    Args:
        model: Its ``init_cfg`` say where the base is. Nothing is loaded into it.
        checkpoint: From :func:`mmdyt.tuned.file.read`.

    Raises:
        FileNotFoundError: If the base is missing.
        ValueError: If the file is of another method, or the base is another.
    """
    about = checkpoint['tuned']
    host = model.module if isinstance(model, BaseTTAModel) else model
    file, known = about['file'], about['base']
    if methods(host) != about['method']:
        raise ValueError(
            f"checkpoint must be of the model's method, got {_said(about['method'])} in {file} for a model with "
            f'{_said(methods(host))}.'
        )
    base = dict(base_tensors(host)) if known['tensors'] else {}
    found = compare(known['tensors'], base)
    if found.form is None:
        problems = [(found.different, 'differ'), (found.missing, 'are missing')]
        told = '; '.join(f'{len(names)} {what}, first {names[0]}' for names, what in problems if names)
        raise ValueError(
            f'base must be that on which {file} was tuned, {known["name"]} ({", ".join(known["files"])}), got '
            f'{", ".join(base_files(host)) or "none in init_cfg"}: of its {len(known["tensors"])} tensors {told}.'
        )
    return {name: base[name] for name in known['tensors']} | checkpoint['state_dict']


def methods(model: nn.Module) -> dict[str, int]:
    """How many parts of which kind there are; scales, which leave no trace in tensors, are told, too."""
    found = Counter(map(_label, parts(model)))
    return {label: found[label] for label in sorted(found)}


def base_files(model: nn.Module) -> list[str]:
    """Names of the files that the model's pre-trained base is read from."""
    return list(dict.fromkeys(init_cfg['checkpoint'] for _, init_cfg in _pretrained(model)))


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the ``init_cfg`` of the model's modules load, under the model's names.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If there is nothing in it below the prefix.
    """
    for place, init_cfg in _pretrained(model):
        path, prefix = init_cfg['checkpoint'], (init_cfg.get('prefix') or '').rstrip('.')
        if '://' not in path and not Path(path).expanduser().is_file():
            raise FileNotFoundError(f'base must lie where init_cfg says, got no file {path}.')
        content = CheckpointLoader.load_checkpoint(path, map_location='cpu', logger='silent')
        tensors = content.get('state_dict', content)
        if isinstance(content, dict) and 'tuned' in content:
            raise ValueError(f'base must be whole, got {path}, which holds what was tuned alone.')
        start = f'{prefix}.' if prefix else ''
        for name, tensor in tensors.items():
            name = re.sub(r'^module\.', '', name)
            if name.startswith(start) and isinstance(tensor, Tensor):
                yield f'{place}.{name.removeprefix(start)}'.lstrip('.'), tensor


def _pretrained(model: nn.Module) -> Iterator[tuple[str, Mapping]]:
    """All ``init_cfg`` of type Pretrained, with the names of their modules."""
    for place, module in model.named_modules():
        found = getattr(module, 'init_cfg', None) or ()
        for init_cfg in [found] if isinstance(found, Mapping) else found:
            kind = init_cfg.get('type')
            name = kind if isinstance(kind, str) else getattr(kind, '__name__', '')
            if name.rpartition('.')[2] in ('Pretrained', 'PretrainedInit'):
                yield place, init_cfg


def _label(part: Part) -> str:
    scale = getattr(part, 'scale', None)
    return type(part).__name__ + (f'(scale={scale:g})' if is_number(scale) else '')


def _said(found: Mapping[str, int]) -> str:
    """Kinds of parts in words."""
    words = [f'{number} {label}' for label, number in found.items()]
    more = f' and {len(words) - SHOWN} more kinds' if len(words) > SHOWN else ''
    return ', '.join(words[:SHOWN]) + more if words else 'no parts'


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.detach().cpu().float(), other.detach().float())


def _input(model: nn.Module) -> dict:
    """Size of the images, (H, W) pixels, and what they are normalised by, as far as the model tells."""
    size = getattr(getattr(model, 'backbone', None), 'img_size', None)
    found = dict(size=[size, size] if isinstance(size, int) else None if size is None else list(map(int, size)))
    for name in ('mean', 'std'):
        values = getattr(getattr(model, 'data_preprocessor', None), name, None)
        found[name] = values.flatten().tolist() if isinstance(values, Tensor) else None
    return found
