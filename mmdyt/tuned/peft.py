"""LoRA files of Hugging Face PEFT, for Vision Transformers: ``W' = W + s B A`` of rank r, where s is alpha / r.

Format: PEFT's documentation, "PEFT checkpoint format". No code of a file is run, and PEFT is not needed.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mmdyt.files import whole_file, write_json

from .file import read

WEIGHTS, CONFIG = 'adapter_model.safetensors', 'adapter_config.json'
PREFIX = 'base_model.model.'
LORA = re.compile(r'(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight')
LAYER = re.compile(r'(?:^|.*\.)(?:layer|layers|blocks)\.(?P<index>\d+)\.(?P<name>.+)')
# what libraries call the linears of a layer (Hugging Face's ViT and DINOv2, its CLIP, timm), and what we do
SITES = {
    'attention.attention.query': 'attn.q',
    'attention.attention.key': 'attn.k',
    'attention.attention.value': 'attn.v',
    'attention.output.dense': 'attn.proj',
    'intermediate.dense': 'mlp.fc1',
    'output.dense': 'mlp.fc2',
    'self_attn.q_proj': 'attn.q',
    'self_attn.k_proj': 'attn.k',
    'self_attn.v_proj': 'attn.v',
    'self_attn.out_proj': 'attn.proj',
    'attn.qkv': 'attn.qkv',
    'attn.proj': 'attn.proj',
    'mlp.fc1': 'mlp.fc1',
    'mlp.fc2': 'mlp.fc2',
}
HF = {site: name for name, site in list(SITES.items())[:6]}  # its ViT
HEADS = ('classifier', 'head', 'fc')
# settings of an adapter_config.json that must be as PEFT's plain LoRA has them
PLAIN = dict(
    use_dora=False,
    fan_in_fan_out=False,
    lora_bias=False,
    bias='none',
    layer_replication=None,
    alora_invocation_tokens=None,
)
CHANGE_BASE = ('pissa', 'olora', 'corda', 'loftq')  # start values that take something out of the base


@dataclass
class Update:
    """A low-rank update of one linear layer.

    Attributes:
        down: A, (r, in).
        up: B, (out, r).
        scale: s.
    """

    down: Tensor
    up: Tensor
    scale: float


@dataclass
class PeftAdapter:
    """What is in a folder of PEFT.

    Attributes:
        updates: By layer and our name of the linear, such as ``(0, 'attn.q')``.
        head: ``weight`` and ``bias`` of a linear classifier, where it was saved.
        dropout: Of training.
    """

    updates: dict[tuple[int, str], Update]
    head: dict[str, Tensor] = field(default_factory=dict)
    dropout: float = 0.0


def read_peft(folder: str | Path) -> PeftAdapter:
    """Read ``adapter_model.safetensors`` and ``adapter_config.json``.

    Raises:
        FileNotFoundError: If one is missing.
        ValueError: If the adapter is no plain LoRA of the linears of a ViT, or a file is broken.
    """
    folder = Path(folder)
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise FileNotFoundError(f'folder must hold {name}, got none in {folder}.')
    try:
        config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
        tensors = read(folder / WEIGHTS)['state_dict']
    except Exception as error:  # the package safetensors has errors of its own
        raise ValueError(f'folder must hold whole files of PEFT, got {folder}: {error}.') from error
    _check_plain(config, folder)
    return _adapter(config, tensors, folder)


def _check_plain(config: Mapping, folder: Path) -> None:
    if config.get('peft_type') != 'LORA':
        raise ValueError(f'peft_type must be LORA, got {config.get("peft_type")!r} in {folder}.')
    for key, plain in PLAIN.items():
        if config.get(key, plain) not in (plain, None):
            raise ValueError(f'{key} must be {plain!r} of a LoRA that is read, got {config[key]!r} in {folder}.')
    start = config.get('init_lora_weights')
    if isinstance(start, str) and start.lower().startswith(CHANGE_BASE):
        raise ValueError(f'init_lora_weights must leave the base as it is, got {start!r} in {folder}.')


def _adapter(config: Mapping, tensors: Mapping[str, Tensor], folder: Path) -> PeftAdapter:
    pairs: dict[str, dict[str, Tensor]] = {}
    head = {}
    for name, tensor in tensors.items():
        module = name.removeprefix(PREFIX)
        found, place = LORA.fullmatch(module), module.rpartition('.')
        if found:
            pairs.setdefault(found['module'], {})[found['matrix']] = tensor
        elif place[0].split('.')[-1] in HEADS and place[2] in ('weight', 'bias'):
            head[place[2]] = tensor
        else:
            raise ValueError(f'tensors must be of LoRA or a classifier, got {name} in {folder}.')
    updates = {}
    for module, pair in pairs.items():
        layer = LAYER.fullmatch(module)
        site = SITES.get(layer['name']) if layer else None
        if site is None or set(pair) != {'A', 'B'} or pair['A'].dim() != 2 or len(pair['A']) != pair['B'].shape[-1]:
            raise ValueError(f'tensors must be updates A and B of linears of a ViT, got {module} in {folder}.')
        updates[int(layer['index']), site] = Update(pair['A'], pair['B'], _scale(config, module, len(pair['A'])))
    if not updates:
        raise ValueError(f'tensors must hold updates of LoRA, got none in {folder}.')
    return PeftAdapter(updates, head, float(config.get('lora_dropout') or 0.0))


def _scale(config: Mapping, module: str, rank: int) -> float:
    """Of an update: alpha / r, or alpha / sqrt(r) where it is rank-stabilised; some modules have an own alpha."""
    own = config.get('alpha_pattern') or {}
    alpha = next((a for key, a in own.items() if re.match(rf'(.*\.)?({key})$', module)), config.get('lora_alpha', 8))
    return alpha / (math.sqrt(rank) if config.get('use_rslora') else rank)


def part_configs(adapter: PeftAdapter) -> list[dict]:
    """What a backbone's ``parts`` must say for an adapter."""
    groups: dict[tuple[str, int, float], list[int]] = {}
    for (layer, site), update in sorted(adapter.updates.items()):
        groups.setdefault((site, len(update.down), update.scale), []).append(layer)
    return [
        dict(type='mmdyt.LoRA', on=site, rank=rank, scale=scale, dropout=adapter.dropout, layers=layers)
        for (site, rank, scale), layers in groups.items()
    ]


def to_state(adapter: PeftAdapter) -> dict[str, Tensor]:
    """The updates under the names that a model of :func:`part_configs` has for them."""
    found = {}
    for (layer, site), update in adapter.updates.items():
        place, _, short = site.partition('.')
        start = f'backbone.layers.{layer}.dynamic.{place}.lora.{short}'
        found |= {f'{start}.down': update.down.float(), f'{start}.up': update.up.float()}
    return found


def write_peft(adapter: PeftAdapter, folder: str | Path, base: str = '', root: str = 'vit.encoder.layer') -> None:
    """Write a folder that PEFT reads for Hugging Face's ``ViTForImageClassification``.

    An update of all rows of ``attn.qkv`` becomes three, which share A.

    Args:
        adapter: What to write.
        folder: Is made where it is missing.
        base: Name of the pre-trained model, which PEFT calls ``base_model_name_or_path``.
        root: Path of the layers within the model.
    """
    from safetensors.torch import save

    updates = {f'{root}.{layer}.{HF[site]}': update for (layer, site), update in _split(adapter.updates)}
    rank, alpha = (_most([pick(update) for update in updates.values()]) for pick in (_rank, _alpha))
    tensors = {}
    for module, update in updates.items():
        tensors[f'{PREFIX}{module}.lora_A.weight'] = update.down.detach().cpu().contiguous().clone()
        tensors[f'{PREFIX}{module}.lora_B.weight'] = update.up.detach().cpu().contiguous().clone()
    tensors |= {f'{PREFIX}classifier.{name}': t.detach().cpu().contiguous().clone() for name, t in adapter.head.items()}
    config = dict(
        peft_type='LORA',
        task_type=None,
        base_model_name_or_path=base,
        inference_mode=True,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(updates),
        rank_pattern={name: _rank(update) for name, update in updates.items() if _rank(update) != rank},
        alpha_pattern={name: _alpha(update) for name, update in updates.items() if _alpha(update) != alpha},
        bias='none',
        fan_in_fan_out=False,
        modules_to_save=['classifier'] if adapter.head else None,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / WEIGHTS, 'wb') as file:
        file.write(save(tensors, {'format': 'pt'}))
    write_json(folder / CONFIG, config)


def _split(updates: Mapping[tuple[int, str], Update]) -> Iterator[tuple[tuple[int, str], Update]]:
    """Updates of single rows, where one has all rows of ``attn.qkv``."""
    for (layer, site), update in sorted(updates.items()):
        if site != 'attn.qkv':
            yield (layer, site), update
            continue
        for row, up in zip('qkv', torch.chunk(update.up, 3), strict=True):
            yield (layer, f'attn.{row}'), Update(update.down, up, update.scale)


def _rank(update: Update) -> int:
    return len(update.down)


def _alpha(update: Update) -> float:
    alpha = round(update.scale * len(update.down), 9)
    return int(alpha) if alpha == int(alpha) else alpha


def _most(values: Sequence):
    return max(dict.fromkeys(values), key=values.count)
