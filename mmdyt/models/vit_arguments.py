"""What the arguments of the backbone must be, and what it tells of a pass."""

import warnings
from collections.abc import Iterable, Mapping, Sequence

from mmdyt.core.block import DISPATCH, Block
from mmdyt.core.branch import INFERENCE, TRAINING, NothingSkippedWarning
from mmdyt.core.executors import KEYS
from mmdyt.core.options import check_choice, check_probability, check_switches, is_integer, is_number
from mmdyt.core.part import FILLED_IN, STEPS, Dispatcher, Part, TokenOp
from mmdyt.core.restoring import NEED_OWNER, RESTORE, WITHOUT_OWNER
from mmdyt.core.tokens import TokenState
from mmdyt.models.part_configs import DECIDE_PER

SIZES = {'embed_dims', 'num_layers', 'num_heads', 'feedforward_channels'}  # that mmpretrain reads of an arch


class RunsDenseWarning(UserWarning):
    """Skipping would take longer here than running all tokens, so all run."""


def check_own(
    dispatch: str,
    inference: str,
    training: str,
    keys: str,
    break_even: float | None,
    skip_unread: bool,
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
    check_switches(skip_unread=skip_unread)
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


def check_not_filled_in(kinds: Sequence[type[Part]], options: Sequence[Mapping]) -> None:
    """Refuse what parts are told by the network that they are added to.

    Raises:
        ValueError: Naming the first one.
    """
    for kind, given in zip(kinds, options, strict=True):
        for name in FILLED_IN:
            if name in given:
                raise ValueError(
                    f'parts must not set {name} of a {kind.__name__}, which is filled in, got {given[name]!r}.'
                )


def check_parts(layers: Sequence[Block], out_type: str, restore: str) -> None:
    """Refuse parts that cannot work behind others, or with what heads are to get.

    Raises:
        ValueError: Naming the first one.
    """
    before: list[Part] = []
    _check_chained(layers)
    for layer in layers:
        before += [part for step in STEPS for part in layer.steps(step)]
        beside = [part for b in layer.branches().values() for part in (b.dispatcher, *b.deltas()) if part is not None]
        for part in beside:
            part.check(before)
        before += beside
        _check_stopping(layer)
        for part in layer.steps('around'):
            if layer.branch('mlp').dispatcher is not None:
                raise ValueError(
                    f'dispatcher must be None beside a {type(part).__name__} around the MLP, got one: '
                    'tokens either skip it or share its update.'
                )
    for part in before:
        if isinstance(part, TokenOp) and part.drops and out_type != 'cls_token' and restore in NEED_OWNER:
            raise ValueError(
                f'restore must be {WITHOUT_OWNER} with a {type(part).__name__} that drops tokens, got {restore!r}.'
            )


def _check_stopping(layer: Block) -> None:
    """Refuse parts that cannot skip the tokens that a dispatcher stops."""
    for branch in layer.branches().values():
        for part in branch.deltas() if branch.stops else ():
            if part.reads_all or part.carried() or part.place == 'inactive':
                raise ValueError(
                    f'dispatcher must not be a {type(branch.dispatcher).__name__} beside a {type(part).__name__}, '
                    'which needs the tokens that are skipped, got one.'
                )


def _check_chained(layers: Iterable[Block]) -> None:
    """Refuse layers that lack a dispatcher which must be in every layer behind the first that has one."""
    chained: dict[str, type[Dispatcher]] = {}
    for index, layer in enumerate(layers):
        for site, branch in layer.branches().items():
            kind = chained.get(site)
            if kind is not None and type(branch.dispatcher) is not kind:
                found = 'none' if branch.dispatcher is None else f'a {type(branch.dispatcher).__name__}'
                raise ValueError(
                    f'dispatcher must be a {kind.__name__} in every layer behind the first that has one, got {found} '
                    f'in layer {index}.'
                )
            if branch.dispatcher is not None and branch.dispatcher.chained:
                chained[site] = type(branch.dispatcher)


def following(levels: Sequence[int], depth: int) -> list[int]:
    """Layers that decide nothing where one decision is made for each level: all but the first behind a level.

    Args:
        levels: Indices of the layers that levels are read behind.
        depth: Layers.
    """
    first = {0, *(level + 1 for level in levels)}
    return [i for i in range(depth) if i not in first]


def chosen(layers: Sequence[int] | None, depth: int) -> list[int]:
    """Indices of layers, negative ones from the end; None is all.

    Raises:
        ValueError: If they are no list, or one is out of range.
    """
    if layers is None:
        return list(range(depth))
    if not isinstance(layers, list | tuple | range) or not layers:
        raise ValueError(f'layers must be a list of indices, or None for all, got {layers!r}.')
    for layer in layers:
        if not (is_integer(layer) and -depth <= layer < depth):
            raise ValueError(f'layers must hold indices below the depth {depth}, got {layer!r}.')
    return sorted({layer % depth for layer in layers})


def tell_of(state: TokenState, told: set[type[Warning]]) -> None:
    """Warn, once of each kind, whoever called the backbone's forward: of a pass that did not skip what it could.

    Args:
        state: Of the pass that ended.
        told: The kinds that were told; changed.
    """
    kinds = {
        NothingSkippedWarning: (
            state.unskipped,
            'torch.no_grad() must be around the inference of a dispatched model, got one with gradients enabled: '
            'every token ran, none was skipped. For gradients (saliency maps) silence this by '
            "warnings.simplefilter('ignore', mmdyt.core.branch.NothingSkippedWarning).",
        ),
        RunsDenseWarning: (
            state.dense,
            'break_even must lie above the share of active tokens for any to be skipped: here skipping would take '
            'longer than running all of them, so all run, with the same result.',
        ),
    }
    for kind, (happened, message) in kinds.items():
        if happened and kind not in told:
            told.add(kind)
            warnings.warn(message, kind, stacklevel=4)  # whoever called forward


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
