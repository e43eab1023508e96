"""Files of what was tuned, without the frozen network."""

import json
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn as nn
from torch import Tensor

from mmdyt.core.part import parts
from mmdyt.files import whole_path
from mmdyt.tuned.fingerprint import compare, fingerprint

FORMAT = 'mmdyt.adapt.1'


def save_tuned(vit: nn.Module, method: str, rate: float | None, path: Path) -> None:
    """Write parts, tuned parameters and buffers of an adapted network; none of it is ever executed when read.

    Args:
        vit: The network.
        method: What tells methods apart.
        rate: That was set.
        path: ``.safetensors``, or another ending.
    """
    kept, base = _divided(vit)
    about = dict(format=FORMAT, method=method, rate=json.dumps(rate), base=json.dumps(fingerprint(base)))
    kept = {name: value.detach().cpu().contiguous().clone() for name, value in kept.items()}
    with whole_path(path) as beside:
        if path.suffix == '.safetensors':
            from safetensors.torch import save_file

            save_file(kept, beside, metadata=about)
        else:
            torch.save(dict(about, tensors=kept), beside)


def load_tuned(vit: nn.Module, method: str, path: Path) -> float | None:
    """Read what :func:`save_tuned` wrote into a network that was adapted in the same way; returns the rate.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is none of ours, or of another method, network or head; nothing is changed then.
    """
    about, tensors = _read(path)
    if about.get('format') != FORMAT:
        raise ValueError(f'path must name a file that Adapted.save wrote, got {path}.')
    if about['method'] != method:
        raise ValueError(f'method must be that of {path.name}, {about["method"]}, got {method}.')
    wanted, base = _divided(vit)
    for name in sorted(wanted.keys() ^ tensors.keys()):
        if not name.endswith('.capacity'):
            where = 'the network' if name in wanted else 'the file'
            raise ValueError(f'{path.name} must hold what the network tunes, got {name} in {where} only.')
    for name, value in sorted(tensors.items()):
        if name in wanted and value.shape != wanted[name].shape:
            raise ValueError(
                f'{path.name} must hold tensors as the network has them, got {name} of {tuple(value.shape)}, not '
                f'{tuple(wanted[name].shape)}.'
            )
    match = compare(json.loads(about['base']), base)
    if match.form is None:
        name = [*match.missing, *match.different][0]
        raise ValueError(f'vit must have the frozen tensors that {path.name} was tuned on, got another {name}.')
    vit.load_state_dict(tensors, strict=False)
    return json.loads(about['rate'])


def _divided(vit: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is saved of a network, and the rest."""
    of_parts = {id(part) for part in parts(vit)}
    within = tuple(f'{name}.' for name, module in vit.named_modules() if id(module) in of_parts)
    parameters = dict(vit.named_parameters(remove_duplicate=False))
    kept, rest = {}, {}
    for name, value in vit.state_dict().items():
        frozen = name in parameters and not parameters[name].requires_grad and not name.startswith(within)
        (rest if frozen else kept)[name] = value
    return kept, rest


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """What a file says of itself, and its tensors."""
    if not path.is_file():
        raise FileNotFoundError(f'path must name a file, got {path}.')
    try:
        if path.suffix == '.safetensors':
            from safetensors import safe_open

            with safe_open(path, 'pt') as file:
                return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = torch.load(path, map_location='cpu', weights_only=True)
        return about, about.pop('tensors')
    except ImportError:
        raise
    except Exception as error:
        if (
            isinstance(error, (OSError, UnpicklingError, RuntimeError, ValueError, KeyError, AttributeError))
            or type(error).__name__ == 'SafetensorError'
        ):
            raise ValueError(f'path must name a whole file that Adapted.save wrote, got {path}: {error}') from None
        raise
