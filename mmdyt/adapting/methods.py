"""Methods by word, as lists of parts. The words are those of ``configs/_base_/methods``; what hooks do is left out."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mmdyt import parts
from mmdyt.core.block import DISPATCH
from mmdyt.core.options import check_choice
from mmdyt.core.part import Delta, Dispatcher, Part

Given = str | Sequence[Mapping | type[Part]]


@dataclass(frozen=True)
class Method:
    """What is added to a network.

    Attributes:
        parts: Configs of parts: ``type``, a class or its name, and options; ``layers`` says which get it.
        dispatch: Which branch is dispatched.
        keys: Which tokens active ones attend to.
        word: The word that named it; None where parts were given.
    """

    parts: tuple[Mapping, ...] = ()
    dispatch: str = 'mlp'
    keys: str = 'active'
    word: str | None = None

    def built(self) -> tuple[list[type[Part]], list[dict]]:
        """Classes and options of the parts; those beside a branch once for each branch that is dispatched."""
        kinds, options = [], []
        for config in self.parts:
            kind, rest = part_class(config['type']), {key: value for key, value in config.items() if key != 'type'}
            beside = issubclass(kind, Delta | Dispatcher) and self.dispatch == 'attn_mlp' and 'site' not in rest
            for site in DISPATCH[self.dispatch] if beside else (None,):
                kinds.append(kind)
                options.append(rest if site is None else rest | dict(site=site))
        return kinds, options

    def text(self) -> str:
        """The same for the same method; what files are compared by."""
        kinds, options = self.built()
        listed = [[kind.__name__, config] for kind, config in zip(kinds, options, strict=True)]
        return json.dumps([self.dispatch, self.keys, listed], sort_keys=True, default=repr)


ADAPTER = dict(type='Adapter')
FITTED = (ADAPTER, dict(type='TokenDispatcher', noise=False, fitted=True), dict(type='MeanUpdate'))
METHODS = dict(
    linear=Method(),
    adapter=Method((ADAPTER,)),
    adapter_plus=Method((dict(type='AdapterPlus'),)),
    lora=Method((dict(type='LoRA', on='attn.qkv', rows='qv'),)),
    ssf=Method((dict(type='SSF'),)),
    ether=Method((dict(type='ETHER'),)),
    ether_plus=Method((dict(type='ETHERPlus'),)),
    vpt_shallow=Method((dict(type='Prompts'),)),
    vpt_deep=Method((dict(type='Prompts', deep=True),)),
    dyt=Method((ADAPTER, dict(type='TokenDispatcher'))),
    evidence=Method(FITTED),
    context=Method(FITTED, dispatch='layer', keys='all'),
    tome=Method((dict(type='ToMe'),)),
    sparse_tuning=Method((dict(type='SparseTokens'), dict(type='DenseAdapter'))),
    sparse_evidence=Method((dict(type='EvidenceTokens'), dict(type='DenseAdapter'))),
)


def method_of(method: Given, options: Mapping, dispatch: str | None = None, keys: str | None = None) -> Method:
    """A method with some options changed.

    Args:
        method: A word, or a list of parts: configs or classes.
        options: For the parts that know an option of that name.
        dispatch: Another branch than the word says; None is its own, ``'mlp'`` for a list.
        keys: Likewise, ``'active'`` for a list.

    Raises:
        ValueError: If there is no such method, or no part of it has such an option.
    """
    if isinstance(method, str):
        check_choice(METHODS, method=method)
        found = replace(METHODS[method], word=method)
    elif isinstance(method, Sequence):
        found = Method(tuple(_config(part) for part in method))
    else:
        raise ValueError(f'method must be a word or a list of parts, got {method!r}.')
    changes = {name: value for name, value in dict(dispatch=dispatch, keys=keys).items() if value is not None}
    known = [_options_of(part_class(config['type'])) for config in found.parts]
    for name in options:
        if not any(name in names for names in known):
            raise ValueError(f'options must be some that the parts know, {sorted(set().union(*known))}, got {name!r}.')
    pairs = zip(found.parts, known, strict=True)
    changed = tuple(dict(c, **{n: v for n, v in options.items() if n in names}) for c, names in pairs)
    return replace(found, parts=changed, **changes)


def part_class(kind: str | type) -> type[Part]:
    """A class of a part by itself or by its name, with ``mmdyt.`` or without.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(kind, str):
        classes = parts.classes()
        name = kind.removeprefix('mmdyt.')
        if name not in classes:
            raise ValueError(f'type must be one of {sorted(classes)}, or a class, got {kind!r}.')
        return classes[name]
    if not (isinstance(kind, type) and issubclass(kind, Part)):
        raise ValueError(f'type must be a part, a subclass of mmdyt.core.part.Part, got {kind!r}.')
    return kind


def _config(part: Mapping | type[Part]) -> Mapping:
    """A part of a list as a config."""
    if isinstance(part, Mapping) and 'type' in part:
        return part
    if isinstance(part, type):
        return dict(type=part)
    raise ValueError(f'method must hold configs with a type, or classes of parts, got {part!r}.')


def _options_of(kind: type[Part]) -> set[str]:
    """Names of what may be said of a part."""
    functions = (kind.__init__, kind.add_to)
    named = {name for function in functions for name in inspect.signature(function).parameters}
    return {*named, 'layers'} - {'self', 'block', 'options', 'dim', 'num_prefix_tokens', 'in_features', 'out_features'}
