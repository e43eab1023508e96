"""Fills a config from the data it is for: how many classes there are, their names, folders, sizes.

A config with ``own = dict(layout=..., root=..., ...)`` says ``'own.classes'`` and the like where the data knows better.
The filled config holds plain values and no ``own``, and so do its copy in the work dir and the checkpoints: both load
where the data is not.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.utils import import_modules_from_strings

from mmdyt.core.options import is_integer

from .names import near
from .own_layouts import read_class_folders, read_clips, read_masks
from .refusals import part

LAYOUTS = dict(class_folders=read_class_folders, masks=read_masks, clips=read_clips)
KEY = 'own'
NAME = re.compile(r'own\.(\w+)')


@dataclass(frozen=True)
class OwnData:
    """What a user says of data of their own.

    Args:
        layout: ``'class_folders'``, ``'masks'`` or ``'clips'``.
        root: The folder of the data.
        val: The share of the training data to hold out for validation, in (0, 1); None where there is a folder for it.
        seed: Of what is held out.
        size: Pixels that the model sees, across and down.
        flip: How often training mirrors a sample, in [0, 1].
        frames: Of a clip that the model sees.
        ignore_zero: Whether label 0 of masks is ignored, and the first class is label 1.

    Raises:
        FileNotFoundError: If the root is missing.
        ValueError: If an option is out of range.
    """

    layout: str
    root: str
    val: float | None = None
    seed: int = 0
    size: int = 224
    flip: float = 0.5
    frames: int = 8
    ignore_zero: bool = False

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise ValueError(f'own.layout must be one of {list(LAYOUTS)}, got {self.layout!r}.')
        if not isinstance(self.root, str) or not self.root:
            raise ValueError(
                f'own.root must name the folder of your data, got {self.root!r}. Set it: --cfg-options own.root=FOLDER'
            )
        if not Path(self.root).expanduser().is_dir():
            raise FileNotFoundError(f'own.root must name an existing folder, got {self.root}.')
        if self.val is not None and not (_is_number(self.val) and 0 < self.val < 1):
            raise ValueError(f'own.val must lie in (0, 1), a share of the training data, got {self.val!r}.')
        if not (_is_number(self.flip) and 0 <= self.flip <= 1):
            raise ValueError(f'own.flip must lie in [0, 1], got {self.flip!r}.')
        for name, least in (('seed', 0), ('size', 1), ('frames', 1)):
            value = getattr(self, name)
            if not (is_integer(value) and value >= least):
                raise ValueError(f'own.{name} must be an integer of at least {least}, got {value!r}.')
        if not isinstance(self.ignore_zero, bool):
            raise ValueError(f'own.ignore_zero must be True or False, got {self.ignore_zero!r}.')


def fill_from_data(cfg: Config) -> None:
    """Replace each ``'own.NAME'`` of a config by what the data says, and drop ``own``; other configs stay as they are.

    Args:
        cfg: With the command line merged in.

    Raises:
        FileNotFoundError: If data is missing.
        KeyError: If an option or a name is unknown.
        ValueError: If an option or the data is wrong.
    """
    if not isinstance(cfg.get(KEY), Mapping) or 'layout' not in cfg[KEY]:
        return
    given = dict(cfg.pop(KEY))
    known = [field.name for field in fields(OwnData)]
    for option in given:
        if option not in known:
            raise KeyError(f'own must have no option {option}.{near(option, known)}')
    own = OwnData(**given)
    values = _of_model(cfg, own.size) | _sizes(own) | _data(own)
    for key in list(cfg):
        cfg[key] = _filled(cfg[key], values, key)


def _data(own: OwnData) -> dict:
    """What is read in the folders."""
    found = LAYOUTS[own.layout](Path(own.root).expanduser(), own.val is not None)
    parts = [None if own.val is None else dict(part=name, share=own.val, seed=own.seed) for name in ('train', 'val')]
    root = str(Path(own.root).expanduser())
    return found | dict(root=root, classes=len(found['names']), train_part=parts[0], val_part=parts[1])


def _sizes(own: OwnData) -> dict:
    """Sizes that go with each other; of 224 the usual ones."""
    size = own.size
    return dict(
        size=size,
        square=(size, size),
        larger=round(size * 8 / 7),  # the short edge, of which the centre is cut out
        short=(-1, size),
        scale=(4 * size, size),  # the long edge may be four times as long
        scales=(size, round(size * 8 / 7)),
        stride=(max(2 * size // 3, 1),) * 2,
        flip=own.flip,
        frames=own.frames,
        ignore_zero=own.ignore_zero,
    )


def _of_model(cfg: Config, size: int) -> dict:
    """What follows from the architecture of the backbone."""
    with part('custom_imports', 'be imported'):
        import_modules_from_strings(**cfg.get('custom_imports', dict(imports=[])))
    backbone = cfg.model.backbone
    arch, zoo = backbone.get('arch', 'base'), MODELS.get(backbone.type).arch_zoo
    if isinstance(arch, str) and arch not in zoo:
        raise ValueError(f'model.backbone.arch must be one of {sorted(zoo)}, got {arch!r}.')
    arch = zoo[arch] if isinstance(arch, str) else arch
    patch = backbone.get('patch_size', 16)
    if is_integer(patch) and size % patch:
        raise ValueError(f'own.size must be a multiple of {patch}, the patch size, got {size}.')
    return dict(width=arch['embed_dims'], heads=arch['num_heads'], last_layer=arch['num_layers'] - 1)


def _filled(node, values: dict, where: str):
    """A part of a config, in which names stand for values."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            node[key] = _filled(value, values, f'{where}.{key}')
    if isinstance(node, list | tuple):
        return type(node)(_filled(value, values, f'{where}[{i}]') for i, value in enumerate(node))
    found = NAME.fullmatch(node) if isinstance(node, str) else None
    if found is None:
        return node
    if found[1] not in values:
        raise KeyError(f'{where} must name what the data says, got {node}.{near(found[1], values)}')
    return copy.deepcopy(values[found[1]])


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
