"""Frozen linears and norms that parts rewrite. C_out, C_in widths of a linear layer."""

from collections.abc import Iterable, Mapping

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .part import Rewrite

ROWS = dict(q=0, k=1, v=2)  # thirds of the rows of attn.qkv
SITES = ('attn', 'mlp', 'embed', 'norm')  # of frozen modules; the last two are the backbone's


class Rewritable:
    """Mixin of a module that owns frozen linears and norms, which parts may rewrite.

    It has an ``nn.ModuleDict`` named ``dynamic``. A rewrite of ``'attn.proj'`` by a part whose word is ``lora`` is
    ``dynamic.attn.lora.proj``. Queries, keys and values, ``attn.q``, ``attn.k`` and ``attn.v``, are rows of one linear,
    ``attn.qkv``, or linears of their own.
    """

    dynamic: nn.ModuleDict
    _rewritten: frozenset[str] = frozenset()  # names with a rewrite: a pass asks for all of them

    def paths(self) -> Mapping[str, str]:
        """Where the modules are that can be rewritten, by ``<site>.<name>``: their paths within this one."""
        raise TypeError(f'{type(self).__name__} must name its frozen modules.')

    def frozen(self) -> dict[str, nn.Module]:
        """The modules that can be rewritten, by ``<site>.<name>``."""
        return {name: self.get_submodule(path) for name, path in self.paths().items()}

    def find(self, name: str) -> nn.Module:
        """One of them, as it is now: quantisation, say, may have replaced it."""
        return at(self, self.paths()[name])

    def names(self, on: str | Iterable[str], rows: str | None = None) -> list[str]:
        """Resolve the names and groups that a config has.

        Args:
            on: A name, ``'linears'``, ``'all'``, or several of these.
            rows: Of ``attn.qkv``.

        Raises:
            ValueError: If there is no such module, or there are no such rows.
        """
        found, wanted = [], [on] if isinstance(on, str) else list(on)
        frozen = self.frozen()
        linears = [name for name, module in frozen.items() if isinstance(module, nn.Linear)]
        for name in wanted:
            if name in ('linears', 'all'):
                group = linears if name == 'linears' else list(frozen)
                found += [part for each in group for part in (thirds('qkv') if each == 'attn.qkv' else [each])]
            elif name == 'attn.qkv' and rows is not None and (name in frozen or 'attn.q' in frozen):
                found += thirds(rows)
            elif name in frozen or (name in thirds('qkv') and 'attn.qkv' in frozen):
                found.append(name)
            elif name.split('.')[0] not in SITES or any(name.split('.')[0] == each.split('.')[0] for each in frozen):
                raise ValueError(
                    f'on must name some of {[*frozen, "linears", "all"]}, got {name!r}. Rows of attn.qkv are '
                    f'{thirds("qkv")}.'
                )
            # else another owner's: a norm of the backbone, say
        if rows is not None and 'attn.qkv' not in wanted:
            raise ValueError(f"rows must be left out (None) unless on names 'attn.qkv', got {rows!r} with on={on!r}.")
        return list(dict.fromkeys(found))

    def widths(self, name: str) -> tuple[int, int]:
        """Width that a frozen module, or some rows of it, gives, and that it reads."""
        module, rows = self.locate(name)
        weight = module.weight[rows]
        return weight.shape[0], weight[0].numel() if weight.dim() > 1 else weight.shape[0]

    def rewrite(self, name: str, part: Rewrite) -> None:
        """Take in a rewrite of a frozen module, or of rows of it."""
        part.wrap(self.locate(name)[0])
        site, _, short = name.partition('.')
        if site not in self.dynamic:
            self.dynamic[site] = nn.Module()
        room = self.dynamic[site]
        if part.word not in room._modules:
            room.add_module(part.word, nn.ModuleDict())
        if short in getattr(room, part.word):
            raise ValueError(f'parts must have words of their own at {name}, got two named {part.word!r}.')
        getattr(room, part.word)[short] = part
        self._rewritten = self._rewritten | {name}

    def rewrites(self, name: str) -> list[Rewrite]:
        """The rewrites of exactly this module, or these rows, in the order in which their methods came to the site."""
        if name not in self._rewritten:
            return []
        site, _, short = name.partition('.')
        rooms = self.dynamic[site].children() if site in self.dynamic else ()
        return [room[short] for room in rooms if isinstance(room, nn.ModuleDict) and short in room]

    def call(self, name: str, x: Tensor) -> Tensor:
        """Run a frozen module, rewritten where parts say so."""
        module, rewrites = self.find(name), self.rewrites(name)
        return run_rewritten(rewrites, x, module.weight, module.bias) if rewrites else module(x)

    def merge(self) -> list[str]:
        """Fold the rewrites that have a merged form into the frozen weights; returns the names of the others."""
        left = []
        for name in dict.fromkeys([*self.frozen(), *thirds('qkv')]):  # the whole before its rows, as they run
            rewrites = self.rewrites(name)
            if not all(part.merges() for part in rewrites):
                left.append(name)
            elif rewrites:
                self._fold(name, rewrites)
        return left

    @torch.no_grad()
    def _fold(self, name: str, rewrites: list[Rewrite]) -> None:
        """Write the merged weight into the frozen module, and drop the parts."""
        module, rows = self.locate(name)
        bias = None if module.bias is None else module.bias[rows]
        weight, merged = fold(rewrites, module.weight[rows], bias)
        module.weight[rows] = weight
        if merged is not None:
            if module.bias is None:
                module.bias = nn.Parameter(module.weight.new_zeros(len(module.weight)), module.weight.requires_grad)
            module.bias[rows] = merged
        site, _, short = name.partition('.')
        for part in rewrites:
            room = getattr(self.dynamic[site], part.word)
            del room[short]
            if not room:
                delattr(self.dynamic[site], part.word)
        self._rewritten = self._rewritten - {name}

    def locate(self, name: str) -> tuple[nn.Module, slice]:
        """The frozen module of a name, and which of its rows are meant."""
        if name in thirds('qkv') and name not in self.paths():
            module = self.find('attn.qkv')
            third, width = ROWS[name[-1]], len(module.weight) // 3
            return module, slice(third * width, (third + 1) * width)
        return self.find(name), slice(None)


def at(module: nn.Module, path: str) -> nn.Module:
    """As ``module.get_submodule(path)``, for what runs in every pass: it takes as long as a small operator."""
    for name in path.split('.'):
        module = module._modules[name]
    return module


def fold(rewrites: list[Rewrite], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with all rewrites merged into them."""
    for part in rewrites:
        weight, bias = part.merged(weight, bias)
    return weight, bias


def run_rewritten(rewrites: list[Rewrite], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run a linear or norm with its rewrites: the last one runs it.

    The ones before are merged into the weight, in training too: they have no dropout then.
    """
    if not rewrites:
        return F.linear(x, weight, bias)
    *inner, last = rewrites
    return last(x, *fold(inner, weight, bias))


def thirds(rows: str) -> list[str]:
    """``'qv'`` -> ``['attn.q', 'attn.v']``.

    Raises:
        ValueError: If there are no such rows.
    """
    if not rows or not set(rows) <= set(ROWS) or len(set(rows)) < len(rows):
        raise ValueError(f"rows must be some of 'q', 'k', 'v', such as 'qv', got {rows!r}.")
    return [f'attn.{row}' for row in rows]
