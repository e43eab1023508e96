"""Does a checkpoint exist, load safely and fit the model?"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner import CheckpointLoader

from mmdyt.tuned.model import complete

from .finite import check_finite, check_finite_state
from .names import name_of, near
from .resume import missing_state, say_changes, take_over_seed

AUXILIARY = r'(^|\.)aux(iliary)?_head\.'  # heads of which a test has no need


class TunedTensors(dict):
    """Tensors of a tuned-only file: without those of its base, which only a model can name.

    Attributes:
        checkpoint: What was read from the file.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], checkpoint: dict):
        super().__init__(tensors)
        self.checkpoint = checkpoint


def check_exists(name: str, path: str | None) -> None:
    """Refuse a local checkpoint file that does not exist; addresses are left to the loader."""
    if not isinstance(path, str):
        raise TypeError(f'{name} must name a file, got {path!r}.')
    if '://' not in path and not Path(path).expanduser().is_file():
        raise FileNotFoundError(
            f'{name} must name an existing file, got {path}. Weights of timm, DINOv2, CLIP ... are converted by '
            'tools/convert_vit.py.'
        )


def pretrained_cfgs(node, where: str) -> Iterator[tuple[str, dict]]:
    """All ``init_cfg`` of type Pretrained in a model config, with their places."""
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key == 'init_cfg':
            for init_cfg in value if isinstance(value, list) else [value]:
                if init_cfg and not isinstance(init_cfg, dict):
                    raise TypeError(f'{where}.init_cfg must be a dict with a type, got {init_cfg!r}.')
                if init_cfg and isinstance(kind := init_cfg.get('type'), str) and WEIGHT_INITIALIZERS.get(kind) is None:
                    known = WEIGHT_INITIALIZERS.module_dict
                    raise ValueError(f'{where}.init_cfg.type must be an initializer, got {kind!r}.{near(kind, known)}')
                if init_cfg and name_of(init_cfg.get('type')) in ('Pretrained', 'PretrainedInit'):
                    yield f'{where}.init_cfg', init_cfg
        else:
            yield from pretrained_cfgs(value, f'{where}.{key}')


def read_tensors(path: str, prefix: str = '') -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint on the CPU, or the part of it below ``prefix``, without it.

    Raises:
        ValueError: If the file is no checkpoint that loads with torch's safety on, or has nothing below ``prefix``.
    """
    return tensors_in(read_checkpoint(path), path, prefix)


def tensors_in(checkpoint: dict, path: str, prefix: str = '') -> dict[str, torch.Tensor]:
    """As :func:`read_tensors`, of what :func:`read_checkpoint` has read from ``path``."""
    prefix = prefix if not prefix or prefix.endswith('.') else f'{prefix}.'
    if 'tuned' in checkpoint and prefix:
        raise ValueError(
            f'checkpoint must be a whole base, got {path}, which holds what was tuned alone. To start from it: '
            f'--cfg-options load_from={path}'
        )
    tensors = {re.sub(r'^module\.', '', name): tensor for name, tensor in checkpoint['state_dict'].items()}
    tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    if not tensors:
        raise ValueError(f'checkpoint must hold tensors named {prefix!r}..., got none in {path}.')
    return TunedTensors(tensors, checkpoint) if 'tuned' in checkpoint else tensors


def read_checkpoint(path: str) -> dict:
    """A checkpoint on the CPU, its tensors under ``state_dict`` even where the file holds nothing else.

    Raises:
        ValueError: If the file does not load with torch's safety on, or holds no named tensors.
    """
    try:
        checkpoint = CheckpointLoader.load_checkpoint(path, map_location='cpu', logger='silent')
    except Exception as error:
        unsafe = re.search(r'GLOBAL (\S+)', str(error))
        reason = f'it names {unsafe[1]}, which is not allowed' if unsafe else f'it is broken ({type(error).__name__})'
        raise ValueError(
            f'checkpoint must be a file of tensors that torch loads safely, got {path}: {reason}.'
        ) from error
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    tensors = checkpoint.get('state_dict', checkpoint)
    if not (tensors and isinstance(tensors, dict) and all(isinstance(t, torch.Tensor) for t in tensors.values())):
        raise ValueError(f'checkpoint must hold named tensors, in state_dict or on top, got none in {path}.')
    return {**(checkpoint if 'state_dict' in checkpoint else {}), 'state_dict': tensors}


def check_resumable(path: str, cfg: Config | None = None) -> None:
    """Refuse a checkpoint that training did not write, or whose config mmengine would execute on resuming.

    Args:
        path: Of the checkpoint.
        cfg: The config that goes on from it; what it changes is said, and a seed that it lacks is set.

    Raises:
        ValueError: If it holds no state of training, or code, or is not finite.
    """
    checkpoint = read_checkpoint(path)
    missing = missing_state(checkpoint, cfg)
    if missing:
        raise ValueError(
            f'checkpoint must hold the state of training to resume from, got {path} without {", ".join(missing)}. '
            f'To start from its weights: --cfg-options load_from={path}'
        )
    check_finite_state(checkpoint, path)
    if not _is_plain(checkpoint['meta'].get('config', '')):
        raise ValueError(f'checkpoint must hold a config of plain values, got code in that of {path}.')
    if cfg is not None:
        say_changes(path, checkpoint['meta'], cfg)
        take_over_seed(checkpoint['meta'], cfg)


def _is_plain(config: str) -> bool:
    """Whether the text assigns values and calls nothing but ``dict``."""
    syntax = ast.Module, ast.Assign, ast.Name, ast.expr_context, ast.Call, ast.keyword, ast.Constant
    values = ast.Dict, ast.List, ast.Tuple, ast.UnaryOp, ast.unaryop
    nodes = list(ast.walk(ast.parse(config)))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    return all(isinstance(node, syntax + values) for node in nodes) and all(
        (name.id == 'dict') == isinstance(name.ctx, ast.Load) for name in names
    )


def check_fit(
    model: nn.Module, tensors: dict[str, torch.Tensor], path: str, *, exact: bool, spare: str = r'$.'
) -> None:
    """Refuse a checkpoint that would leave a part of the model at random, or belongs to another model.

    Args:
        model: What will load it; it is loaded into, so that position embeddings are resized as they will be.
        tensors: From :func:`read_tensors`.
        path: Named in the message.
        exact: Test and resume need every tensor. Otherwise the checkpoint is a pre-trained base: adapters,
            dispatchers, necks and heads may be missing, and heads, final norms and DINOv2's ``mask_token`` left over.
        spare: What may be left over besides, as a pattern of names.

    Raises:
        ValueError: Naming how many tensors are missing or unexpected or of another shape or not finite, and the first;
            or of a tuned-only file, that its method or its base are others.
    """
    if isinstance(tensors, TunedTensors):
        tensors = complete(model, tensors.checkpoint)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    errors: list[str] = []
    missing, unexpected = _load(model, dict(tensors), errors)
    if not exact:
        backbone = 'backbone.' if hasattr(model, 'backbone') else ''
        added = rf'^{re.escape(backbone)}(ln2\.|(.*\.)?dynamic\.)'
        final = rf'^{re.escape(backbone)}(ln[12]\.|cls_token|mask_token)'
        missing = [n for n in missing if n.startswith(backbone) and not re.search(added, n)]
        unexpected = [n for n in unexpected if n.startswith(backbone) and not re.search(final, n)]
        errors = [e for e in errors if e.startswith(backbone)]
    unexpected = [n for n in unexpected if not re.search(spare, n)]
    problems = [(missing, 'missing'), (unexpected, 'unexpected'), (errors, 'of another shape')]
    found = [f'{len(names)} {what}, first {names[0]}' for names, what in problems if names]
    if found:
        raise ValueError(
            f"checkpoint must fit the model, got {path}: of its {len(tensors)} and the model's {len(shapes)} "
            f'tensors {"; ".join(found)}.'
        )
    check_finite(model, tensors, path)


def _load(model: nn.Module, tensors: dict, errors: list[str]) -> tuple[list[str], list[str]]:
    """Load what fits; return missing and unexpected names, and append the names of another shape to ``errors``."""
    try:
        result = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        errors += re.findall(r'size mismatch for ([^:]+):', str(error))
        for name in errors:
            tensors[name] = model.state_dict()[name]
        result = model.load_state_dict(tensors, strict=False)
    missing = [name for name in result.missing_keys if not name.endswith('num_batches_tracked')]
    return missing, list(result.unexpected_keys)
