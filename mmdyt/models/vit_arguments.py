"""What the arguments of the backbone must be."""

from collections.abc import Mapping, Sequence

from mmdyt.core.block import DISPATCH
from mmdyt.core.branch import INFERENCE, TRAINING
from mmdyt.core.executors import KEYS
from mmdyt.core.options import check_choice, check_probability, check_switches, is_integer, is_number
from mmdyt.core.restoring import RESTORE
from mmdyt.models.part_configs import DECIDE_PER

SIZES = {'embed_dims', 'num_layers', 'num_heads', 'feedforward_channels'}  # that mmpretrain reads of an arch


def check_own(
    dispatch: str,
    inference: str,
    training: str,
    keys: str,
    break_even: float | None,
    skip_unread: bool,
    with_cp: bool,
    decide_per: str,
    restore: str,
    **parts,
) -> None:
    """Refuse arguments of ours that are out of range.

    Raises:
        ValueError: Naming the first one.
    """
    check_choice(DISPATCH, dispatch=dispatch)
    check_choice(TRAINING, training=training)
    check_choice(INFERENCE, inference=inference)
    check_choice(KEYS, keys=keys)
    check_choice(DECIDE_PER, decide_per=decide_per)
    check_choice(RESTORE, restore=restore)
    if keys == 'all' and dispatch == 'mlp':
        raise ValueError("keys must be 'active' with dispatch='mlp', whose tokens attend to nothing, got 'all'.")
    check_break_even(break_even)
    check_switches(skip_unread=skip_unread, with_cp=with_cp)
    for name, part in parts.items():
        if not (part is None or isinstance(part, Mapping)):
            raise ValueError(f'{name} must be a config or None, got {part!r}.')


def check_break_even(break_even: float | None) -> None:
    """Refuse what is no share of tokens."""
    if break_even is not None and not (is_number(break_even) and 0 < break_even <= 1):
        raise ValueError(f'break_even must lie in (0, 1] or be None, got {break_even!r}. It is a share of tokens.')


def check_registers(number: int, with_cls_token: bool) -> None:
    """Refuse what is no number of registers, and registers that stand behind no class token.

    Raises:
        ValueError: Naming the argument.
    """
    if not (is_integer(number) and number >= 0):
        raise ValueError(f'num_registers must be at least 0, got {number!r}.')
    if number and not with_cls_token:
        raise ValueError(f'num_registers must be 0 with with_cls_token=False, got {number}. They follow that token.')


def check_host(arch: str | Mapping, vit: Mapping) -> None:
    """Refuse arguments of mmpretrain's that it would pass over, or fail on late.

    Raises:
        ValueError: Naming the first one.
    """
    if 'frozen_stages' in vit:
        raise ValueError(
            f'frozen_stages must not be set, got {vit["frozen_stages"]}. Choose what is trained with tuned=...'
        )
    if vit.get('out_indices') == []:
        raise ValueError('out_indices must name at least one layer, got [].')
    _check_sizes(arch)
    _check_pixels(**{name: vit[name] for name in ('img_size', 'patch_size') if name in vit})
    check_probability(**{name: vit[name] for name in ('drop_rate', 'drop_path_rate') if name in vit})


def following(levels: Sequence[int], depth: int) -> list[int]:
    """Layers that decide nothing where one decision is made for each level: all but the first behind a level.

    Args:
        levels: Indices of the layers that levels are read behind.
        depth: Layers.
    """
    first = {0, *(level + 1 for level in levels)}
    return [i for i in range(depth) if i not in first]


def _check_sizes(arch: str | Mapping) -> None:
    """Refuse sizes that no ViT has; mmpretrain passes over names that it does not know."""
    if not isinstance(arch, Mapping):
        return
    if unknown := sorted(set(arch) - SIZES):
        raise ValueError(f'arch must hold sizes among {sorted(SIZES)}, got {unknown[0]}.')
    for name, size in arch.items():
        if not (is_integer(size) and size >= 1):
            raise ValueError(f'arch.{name} must be a positive integer, got {size!r}.')
    if {'embed_dims', 'num_heads'} <= arch.keys() and arch['embed_dims'] % arch['num_heads']:
        raise ValueError(f'arch.num_heads must divide embed_dims {arch["embed_dims"]}, got {arch["num_heads"]}.')


def _check_pixels(**options: object) -> None:
    """Refuse a side of an image or patch that has no pixel, and a list of one, which mmpretrain cannot unpack."""
    for name, value in options.items():
        sides = value if isinstance(value, list | tuple) else [value, value]
        if not (len(sides) == 2 and all(is_integer(side) and side >= 1 for side in sides)):
            raise ValueError(f'{name} must be a positive integer, or a list of two, (height, width), got {value!r}.')
