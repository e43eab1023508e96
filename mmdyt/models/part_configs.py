"""Configs of parts: which classes they name, and the short arguments of a backbone as a list of them."""

from collections.abc import Collection, Mapping
from types import MappingProxyType

import mmdyt.parts
from mmdyt.core.block import DISPATCH
from mmdyt.core.options import is_integer
from mmdyt.core.part import Part
from mmdyt.registry import MODELS

DECIDE_PER = ('layer', 'level')
ADAPTER = MappingProxyType(dict(type='mmdyt.Adapter'))
DISPATCHER = MappingProxyType(dict(type='mmdyt.TokenDispatcher'))


def register_parts() -> None:
    """Register every part of :mod:`mmdyt.parts`: a new method is a file there, and nothing else."""
    for found in mmdyt.parts.classes().values():
        MODELS.register_module(module=found)


def part_class(config: Mapping) -> type[Part]:
    """The class that a config of a part names.

    Raises:
        KeyError: If it is not registered.
        ValueError: If it is no config, or names no part.
    """
    kind = config.get('type') if isinstance(config, Mapping) else None
    if not isinstance(kind, str | type):
        raise ValueError(f'parts must hold configs with a type, got {config!r}.')
    found = MODELS.get(kind) if isinstance(kind, str) else kind
    if found is None:
        raise KeyError(f'parts.type must be a registered type, got {kind!r}.')
    if not (isinstance(found, type) and issubclass(found, Part)):
        raise ValueError(f'parts.type must name a part, a subclass of mmdyt.core.part.Part, got {kind!r}.')
    return found


def as_parts(
    dispatch: str,
    adapter: Mapping | None,
    dispatcher: Mapping | None,
    substitute: Mapping | None,
    follow: Collection[int] = (),
    depth: int = 0,
) -> list[dict]:
    """What a backbone's short arguments mean: configs of parts, those of each dispatched branch together.

    Args:
        dispatch: Which branch is dispatched.
        adapter: Of each of these branches, as the two after it; None is none.
        dispatcher: The same.
        substitute: The same.
        follow: Layers of ``depth`` that take over the decision of the layer before them.
        depth: Layers.

    Raises:
        ValueError: If the dispatcher is to be in some layers only, and others to follow.
    """
    if follow and dispatcher is not None and dispatcher.get('layers') is not None:
        raise ValueError(
            f"decide_per must be 'layer' with dispatcher.layers, got {list(dispatcher['layers'])} with 'level'."
        )
    found = []
    for site in DISPATCH[dispatch]:
        if adapter is not None:
            config = dict(ADAPTER, **{key: value for key, value in adapter.items() if key != 'frames_per_clip'})
            # the frames of a clip are told by the pass: here it is only said that they share a mixture
            routing = dict(routing='clip') if frames_per_clip(adapter) > 1 else {}
            found.append(config | routing | dict(site=site))
        if dispatcher is not None:
            decide = dict(layers=[i for i in range(depth) if i not in follow]) if follow else {}
            found.append(DISPATCHER | dispatcher | decide | dict(site=site))
            found += [dict(type='mmdyt.SameDecision', layers=list(follow), site=site)] if follow else []
        found += [dict(substitute, site=site)] if substitute is not None else []
    return found


def frames_per_clip(adapter: Mapping | None) -> int:
    """Frames that a config of an adapter says a clip has; 1 where it says nothing, and every frame is on its own.

    Raises:
        ValueError: If it is no number of frames.
    """
    frames = 1 if adapter is None else adapter.get('frames_per_clip', 1)
    if not (is_integer(frames) and frames >= 1):
        raise ValueError(f'frames_per_clip must be a positive integer, got {frames!r}.')
    return frames
