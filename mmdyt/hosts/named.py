"""A pre-norm layer of any library as a block, from a table of the names that its modules have. N tokens, C width."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from operator import attrgetter

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmdyt.core.block import Block, Place
from mmdyt.core.telling import tell_of
from mmdyt.core.tokens import TokenState

TOLERANCE = 1e-2  # of the largest update, between a layer and the block made of it; rounding is less in TF32, too
NOTHING = ('output_hidden_states', 'return_dict')  # what layers are told and do not read
PROBED = 5  # tokens, of which blocks and layers must make the same

# what is known of the tokens in the passes that run now, by network
STATES: ContextVar[Mapping['Network', TokenState] | None] = ContextVar('mmdyt_states', default=None)
LEFT_OUT: ContextVar[bool] = ContextVar('mmdyt_left_out', default=False)


@dataclass(frozen=True)
class Attention:
    """Where a layer keeps its attention.

    Attributes:
        qkv: Paths of one linear layer for queries, keys and values, or of three.
        proj: Path of the output projection.
        heads: Path of the number of heads.
        dropout: Paths of the dropout on attention weights, a module or a number; where none exists it is 0.
    """

    qkv: tuple[str, ...]
    proj: str
    heads: str
    dropout: tuple[str, ...]


@dataclass(frozen=True)
class FeedForward:
    """Where a layer keeps its MLP: ``down(act(up x))``, or ``down(act(gate x) * up x)``.

    Attributes:
        up: Path of the first linear layer; of twice the width that ``down`` reads it is gate and up in one.
        down: Path of the last.
        act: Path of the activation; None is SiLU.
        gate: Path of a gate of its own; None is none.
        inner: Paths of what runs in front of ``down``, where it exists.
    """

    up: str
    down: str
    act: str | None
    gate: str | None = None
    inner: tuple[str, ...] = ()


@dataclass(frozen=True)
class Names:
    """The names of a library's layers: of each kind those of several versions and models.

    Attributes:
        norms: Pairs of paths, of the norms in front of attention and MLP.
        attentions: Kinds of attention.
        mlps: Kinds of MLPs.
        after_attention: Paths of what runs behind the output projection, in this order, where it exists.
        after_mlp: The same behind the MLP.
    """

    norms: tuple[tuple[str, str], ...]
    attentions: tuple[Attention, ...]
    mlps: tuple[FeedForward, ...]
    after_attention: tuple[str, ...]
    after_mlp: tuple[str, ...]


class Network:
    """What the blocks of one network share: its pass, in one thread (or task) only.

    ``torch.compile`` cannot set context variables: what it traces keeps the state here, in one thread at a time.
    """

    def __init__(self):
        self._traced: TokenState | None = None

    def state(self) -> TokenState | None:
        """Of the pass that runs here and now."""
        return self._traced if torch.compiler.is_compiling() else (STATES.get() or {}).get(self)

    def keep(self, state: TokenState | None) -> None:
        """Hand it on to the next block; None ends the pass."""
        if torch.compiler.is_compiling():
            self._traced = state
            return
        others = {network: of for network, of in (STATES.get() or {}).items() if network is not self}
        STATES.set(others if state is None else others | {self: state})


class NamedLayer(Block):
    """A block that took over the children of a library's layer, under the same names.

    Checkpoints of the library load with only ``*.dynamic.*`` missing. It is an instance of the layer's class, too, for
    whoever looks for layers by that; see :func:`as_block`. Blocks of one network hand on what is known of the tokens:
    the first begins a pass, the last ends it, and gives tokens as the library laid them out.

    Args:
        layer: Its children are adopted; not to be used afterwards.
        names: Of its library.
        place: What parts may know of it.
        dispatch: Which branch is dispatched.
        inference: Executor of inference.
        training: Executor of training, as of the backbone: what cannot run it runs ``'masked'``.
        keys: Which tokens active ones attend to.
        network: The same for all blocks of a network.
        restoring: What patches get whose token was merged or dropped.

    Raises:
        ValueError: If the layer has not the modules that the names say, others with parameters, or other widths.
    """

    kind: type[nn.Module]  # of the library's layer

    def __init__(
        self,
        layer: nn.Module,
        names: Names,
        place: Place,
        *,
        dispatch: str,
        inference: str,
        training: str,
        keys: str,
        network: Network,
        restoring: str,
    ):
        nn.Module.__init__(self)
        # hooks, modes and whatever the library keeps beside its modules stay
        self.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in layer.__dict__.items()})
        self._read_names(names, type(layer).__name__)
        self._network, self._restoring, self._told = network, restoring, set()
        self._gives_tuple = False
        whole, mixes = 'masked' if training in ('split', 'active_only') else training, keys == 'active'
        attn, mlp = (_drops_paths(self, paths) for paths in (self._after_attention, self._after_mlp))
        executors = dict(
            attn=whole if mixes or attn else training,
            mlp=whole if mlp else training,
            layer=whole if mixes or attn or mlp else training,
        )
        self.open(place, dispatch, inference, executors, keys)

    def _read_names(self, names: Names, kind: str) -> None:
        norms = _first(self, names.norms, lambda one: one, kind)
        attention = _first(self, names.attentions, lambda one: (*one.qkv, one.proj, one.heads), kind)
        mlp = _first(self, names.mlps, lambda one: [p for p in (one.up, one.down, one.act, one.gate) if p], kind)
        rows = ('qkv',) if len(attention.qkv) == 1 else ('q', 'k', 'v')
        gate = {} if mlp.gate is None else {'mlp.gate': mlp.gate}
        self._paths = (
            {'attn.norm': norms[0]}
            | {f'attn.{row}': path for row, path in zip(rows, attention.qkv, strict=True)}
            | {'attn.proj': attention.proj, 'mlp.norm': norms[1]}
            | gate
            | {'mlp.fc1': mlp.up, 'mlp.fc2': mlp.down}
        )
        self._mlp = mlp
        self._after_attention, self._after_mlp, self._inner = (
            tuple(path for path in paths if _has(self, path))
            for paths in (names.after_attention, names.after_mlp, mlp.inner)
        )
        self.num_heads = attrgetter(attention.heads)(self)
        dropout = next((attrgetter(path)(self) for path in attention.dropout if _has(self, path)), 0.0)
        self.attn_drop = float(getattr(dropout, 'p', dropout))
        self._check_modules()

    def _check_modules(self) -> None:
        """Refuse what the block would not run, or would count wrongly."""
        for name, module in self.frozen().items():
            if not (name.endswith('norm') or isinstance(module, nn.Linear)):
                raise ValueError(f'vit must have linear layers as {self._paths[name]}, got a {type(module).__name__}.')
        known = [*self._paths.values(), *self._after_attention, *self._after_mlp]
        for name, _ in (*self.named_parameters(), *self.named_buffers()):
            if not any(name.startswith(f'{path}.') for path in known):
                raise ValueError(f'vit must have layers of norms, attention and an MLP alone, got {name} in one.')
        dim = len(self.find('attn.proj').weight)
        for name, width in {'attn.qkv': 3 * dim, 'attn.q': dim, 'attn.k': dim, 'attn.v': dim}.items():
            if name in self._paths and len(self.find(name).weight) != width:
                raise ValueError(
                    f'vit must have heads that share the width {dim}, got {len(self.find(name).weight)} rows of '
                    f'{self._paths[name]}, not {width}.'
                )

    def __reduce_ex__(self, protocol):
        """Classes made on the way are found again by that of the library's layer."""
        return _empty, (self.kind,), self.__dict__

    def paths(self) -> Mapping[str, str]:
        """Where the modules are that can be rewritten, by ``<site>.<name>``."""
        return self._paths

    def after_attention(self, x: Tensor) -> Tensor:
        """Dropout, layer scale and drop path, where there are some."""
        return self._run_all(self._after_attention, x)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The MLP, gated or plain, without the residual connection."""
        act = F.silu if self._mlp.act is None else self.get_submodule(self._mlp.act)
        up, down = self.call('mlp.fc1', x), self.find('mlp.fc2')
        if self._mlp.gate is not None:
            up = act(self.call('mlp.gate', x)) * up
        elif up.shape[-1] == 2 * down.in_features:
            first, second = up.chunk(2, dim=-1)
            up = first * act(second) if self._gate_last() else act(first) * second
        else:
            up = act(up)
        return self._run_all(self._after_mlp, self.call('mlp.fc2', self._run_all(self._inner, up)))

    def _gate_last(self) -> bool:
        return getattr(self.get_submodule(self._mlp.up.rpartition('.')[0]), 'gate_last', False)

    def _run_all(self, paths: Sequence[str], x: Tensor) -> Tensor:
        for path in paths:
            x = self.get_submodule(path)(x)
        return x

    def forward(self, x: Tensor, *args, **kwargs):
        """(B, N, C) -> (B, N, C), in a tuple where the library's layer gives one.

        Raises:
            ValueError: If the library hands over a mask, positions or the like, which blocks do not know, or blocks run
                out of order.
        """
        for name, given in (*(('attention_mask', value) for value in args), *kwargs.items()):
            if given is not None and given is not False and name not in NOTHING:
                raise ValueError(f'{name} must not be given to the layers of an adapted network, got a {type(given)}.')
        if not LEFT_OUT.get():
            x = self._in_pass(x)
        return (x,) if self._gives_tuple else x

    def _in_pass(self, x: Tensor) -> Tensor:
        """Run with what the pass knows of the tokens."""
        first, last = self.place.index == 0, self.place.index == self.place.depth - 1
        state = TokenState(self.place.prefix, restoring=self._restoring) if first else self._network.state()
        if state is None:
            raise ValueError(
                f'layers must run from the first one on, got layer {self.place.index} on its own. Gradient '
                'checkpointing must be off: it runs them again, alone. Take with_cp=True.'
            )
        self._network.keep(None if last else state)
        x = super().forward(x, state)
        if not last:
            return x
        if (state.unskipped or state.dense) and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            tell_of(state, self._told)
        return state.restore(x)


def as_block(layer: nn.Module, names: Names, place: Place, **options) -> NamedLayer:
    """A layer as a block that computes the same: the arguments are those of :class:`NamedLayer`.

    Raises:
        ValueError: If it does not: the layer is another one than its names say.
    """
    block = _class_for(type(layer))(layer, names, place, **options)
    parameter = next(layer.parameters())
    if parameter.device.type == 'meta':
        return block
    x = torch.randn(1, PROBED, place.dim, generator=torch.Generator().manual_seed(0)).to(parameter)
    modes = {module: module.training for module in layer.modules()}
    layer.eval()
    block.eval()
    try:
        with torch.no_grad():
            given, found = layer(x, **_none_for_others(layer)), Block.forward(block, x)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f'vit must have layers that run on tokens alone, got {error!r}.') from None
    finally:
        for module, mode in modes.items():
            module.training = mode
        block.training = layer.training
        block.dynamic.train(layer.training)
    block._gives_tuple = isinstance(given, tuple)
    given = given[0] if block._gives_tuple else given
    if not _near(found, given, x):
        raise ValueError(
            f'vit must have layers that add attention and an MLP to normed tokens, got a {type(layer).__name__} with '
            'modules like these, which computes something else.'
        )
    return block


@contextmanager
def left_out() -> Iterator[None]:
    """Within the context blocks give what they get: what is around them runs alone."""
    token = LEFT_OUT.set(True)
    try:
        yield
    finally:
        LEFT_OUT.reset(token)


@cache
def _class_for(kind: type[nn.Module]) -> type[NamedLayer]:
    """Blocks that are layers of a library's class, too."""
    return type(f'Adapted{kind.__name__}', (NamedLayer, kind), dict(kind=kind, __module__=__name__))


def _empty(kind: type[nn.Module]) -> NamedLayer:
    """A block without anything in it, to be filled by a pickle or a copy."""
    block = _class_for(kind)
    return block.__new__(block)


def _near(found: Tensor, given: Tensor, x: Tensor) -> bool:
    """Whether two updates of x are the same but for rounding; layer scale makes them small beside it."""
    rounding = 4 * torch.finfo(x.dtype).eps * given.abs().max()
    return bool((found - given).abs().max() <= TOLERANCE * (given - x).abs().max() + rounding)


def _has(layer: nn.Module, path: str) -> bool:
    """Whether there is something, not None, at a path."""
    for name in path.split('.'):
        layer = getattr(layer, name, None)
    return layer is not None


def _first(layer: nn.Module, kinds: Sequence, paths_of, kind_of_layer: str):
    """The first kind whose paths all exist."""
    for kind in kinds:
        if all(_has(layer, path) for path in paths_of(kind)):
            return kind
    wanted = [path for path in paths_of(kinds[0]) if not _has(layer, path)]
    raise ValueError(
        f'vit must have layers whose modules are known by name, got a {kind_of_layer} without {wanted[0]}.'
    )


def _none_for_others(layer: nn.Module) -> dict[str, None]:
    """None for what a layer wants to be told beside tokens, masks for the most part."""
    _, *others = inspect.signature(type(layer).forward).parameters.values()
    named = [one for one in others[1:] if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    return {one.name: None for one in named}


def _drops_paths(layer: nn.Module, paths: Sequence[str]) -> bool:
    """Whether a branch is dropped for whole images at random: it must then see which token is whose."""
    return any(getattr(layer.get_submodule(path), 'drop_prob', 0) for path in paths)
