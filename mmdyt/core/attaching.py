"""How parts come to the blocks of a network, and what they must be there. L layers."""

from collections.abc import Iterable, Mapping, Sequence

import torch.nn as nn

from .block import Block
from .options import is_integer
from .part import FILLED_IN, STEPS, Delta, Dispatcher, Part, Rewrite, TokenOp, parts
from .restoring import ADAPT, NEED_OWNER, WITHOUT_OWNER


def add_parts(
    layers: Sequence[Block],
    kinds: Sequence[type[Part]],
    options: Sequence[Mapping],
    outside: nn.Module | None = None,
) -> None:
    """Build parts and attach them, to all layers or to those of the option ``layers``.

    Args:
        layers: The blocks.
        kinds: Classes of the parts.
        options: Of each: ``layers``, where it acts, and arguments of its constructor.
        outside: What owns frozen modules beside the layers, which rewrites of all layers act on, too; None is nobody.

    Raises:
        ValueError: If options set what is filled in, or name layers that there are not, or a part acts nowhere.
    """
    per_part = [chosen(config.get('layers'), len(layers)) for config in options]
    found = [{key: value for key, value in config.items() if key != 'layers'} for config in options]
    check_not_filled_in(kinds, found)
    for i, layer in enumerate(layers):
        for kind, indices, arguments in zip(kinds, per_part, found, strict=True):
            if i in indices:
                kind.add_to(layer, **arguments)
    for kind, config, arguments in zip(kinds, options, found, strict=True):
        if outside is not None and issubclass(kind, Rewrite) and config.get('layers') is None:
            kind.add_to(outside, **arguments)
    owners = list(layers) if outside is None else [outside]
    attached = {type(part) for owner in owners for part in parts(owner)}
    for kind, config in zip(kinds, options, strict=True):
        if kind not in attached:
            raise ValueError(
                f'parts must act somewhere in the network, got a {kind.__name__} with {dict(config)}, which does not.'
            )


def share_decisions(layers: Iterable[Block]) -> None:
    """Tell each dispatcher who decides about the same branch in the layer before."""
    before: dict[str, Dispatcher] = {}
    for layer in layers:
        for site, branch in layer.branches().items():
            if branch.dispatcher is not None:
                branch.dispatcher.follow(before.get(site))
                before[site] = branch.dispatcher.decider


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


def check_parts(layers: Sequence[Block], out_type: str, restore: str) -> None:
    """Refuse parts that cannot work behind others, or with what heads are to get.

    Raises:
        ValueError: Naming the first one.
    """
    before: list[Part] = []
    leaving = any(part.leaves for layer in layers for part in layer.steps('mid'))
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
        if isinstance(part, Delta) and part.reads_all and out_type != 'cls_token' and restore == ADAPT and leaving:
            raise ValueError(
                f'restore must not be {ADAPT!r} with a {type(part).__name__}, which reads all tokens, got it.'
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
