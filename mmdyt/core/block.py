"""The order of things in a block of a Vision Transformer. B images, N tokens, C width, H heads, D head width."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .attention import DENSE, Layout, attend
from .block_macs import BlockMacs
from .branch import DynamicBranch
from .context import RULES, asked_of
from .executors import Branch
from .part import STEPS, TokenOp
from .recomputing import recomputed
from .rewriting import Rewritable, fold, run_rewritten, thirds
from .tokens import TokenState

# which branches of a block are dispatched, by the names of the paper's variants
DISPATCH = dict(mlp=('mlp',), attn=('attn',), attn_mlp=('attn', 'mlp'), layer=('layer',))


class Place(NamedTuple):
    """What parts may know of the block that they are added to.

    Attributes:
        dim: C.
        index: Of the block, from 0.
        depth: Blocks of the network.
        prefix: Leading tokens of the host that are no patches.
        patch_values: Input values of one patch, 3 * 16 * 16.
    """

    dim: int
    index: int
    depth: int
    prefix: int
    patch_values: int


class Block(BlockMacs, Rewritable, nn.Module):
    """A frozen block with rooms for parts; a library's layer names its modules and calls :meth:`open`.

    ``dynamic`` holds a :class:`~mmdyt.core.branch.DynamicBranch` for attention and MLP, one around both where the whole
    layer is dispatched, and the token operations of each step. A library's layer defines :meth:`paths`,
    :meth:`feed_forward` and :meth:`after_attention`.
    """

    place: Place
    dispatch: str
    num_heads: int
    attn_drop: float
    with_cp: bool = False

    def open(
        self, place: Place, dispatch: str, inference: str, training: Mapping[str, str], keys: str = 'active'
    ) -> None:
        """Make room for parts, once, after the library's own constructor.

        Args:
            place: What parts may know.
            dispatch: One of :data:`DISPATCH`.
            inference: Executor of inference.
            training: Executor of training by site.
            keys: Which tokens active ones attend to, ``'active'`` or ``'all'``, where attention is dispatched.
        """
        self.place = place
        self.dispatch = dispatch
        sites = ('layer',) if dispatch == 'layer' else ('attn', 'mlp')
        self.dynamic = nn.ModuleDict(
            {
                site: DynamicBranch(
                    inference=inference, training=training[site], keys='active' if site == 'mlp' else keys
                )
                for site in sites
            }
        )

    @property
    def sites(self) -> tuple[str, ...]:
        """The branches that dispatchers belong to."""
        return DISPATCH[self.dispatch]

    def branches(self) -> dict[str, DynamicBranch]:
        """The branches with room for parts beside them, by site."""
        return {site: branch for site, branch in self.dynamic.items() if isinstance(branch, DynamicBranch)}

    def branch(self, site: str) -> DynamicBranch:
        """The branch at a site, for parts beside it.

        Raises:
            ValueError: If it has no room.
        """
        found = self.branches()
        if site not in found:
            raise ValueError(f'site must be one of {list(found)} with dispatch={self.dispatch!r}, got {site!r}.')
        return found[site]

    def add_step(self, part: TokenOp) -> None:
        """Take in a token operation.

        Raises:
            ValueError: If it has no room.
        """
        if part.step not in STEPS:
            raise ValueError(f'step must be one of {list(STEPS)}, got {part.step!r} of a {type(part).__name__}.')
        if part.step in ('mid', 'around') and self.dispatch == 'layer':
            raise ValueError(f"dispatch must not be 'layer' with a {type(part).__name__}, which acts within the layer.")
        if part.reads_attention and self.dispatch != 'mlp':
            raise ValueError(
                f"dispatch must be 'mlp' with a {type(part).__name__}, which reads the attention of all tokens, got "
                f'{self.dispatch!r}.'
            )
        if part.step == 'around' and self.steps('around'):
            raise ValueError(f'parts must be one around an MLP, got a {type(part).__name__} beside another.')
        if part.step not in self.dynamic:
            self.dynamic[part.step] = nn.ModuleDict()
        if part.word in self.dynamic[part.step]:
            raise ValueError(f'parts must have words of their own at {part.step}, got two named {part.word!r}.')
        self.dynamic[part.step][part.word] = part

    def steps(self, step: str) -> list[TokenOp]:
        """The token operations of a step, in the order in which they were added."""
        return list(self.dynamic[step].values()) if step in self.dynamic else []

    def forward(self, x: Tensor, state: TokenState | None = None) -> Tensor:
        """(B, N, C) -> (B, N', C), or (B, read, C) where the state says so.

        With ``with_cp`` gradients come from a second run in the backward pass: less memory, more time.
        """
        state = TokenState(self.place.prefix) if state is None else state
        if self.with_cp and torch.is_grad_enabled():
            return recomputed(self._forward, x, state)
        return self._forward(x, state)

    def _forward(self, x: Tensor, state: TokenState) -> Tensor:
        """The order of things."""
        state.begin_block()
        x = self.run('enter', x, state)
        if 'layer' in self.dynamic:
            x = self.dynamic['layer'](x, self.whole_layer, state)
            state.prompts *= state.read is None  # else what is read is all that is left
        else:
            before = self._before_mlp(state)
            x = self.dynamic['attn'](x, partial(self.attention_branch, state=state), before)
            self.dynamic['attn'].adapt_left(state)
            state.prompts *= before.read is None  # as above
            x = self.run('mid', x, state)
            x = self.dynamic['mlp'](x, self._mlp_on_fewer(x, state), state)
            self.dynamic['mlp'].adapt_left(state)
            state.note_attention(None, None)
        return self.run('leave', x, state)

    def run(self, step: str, x: Tensor, state: TokenState) -> Tensor:
        """Apply the token operations of a step, or what rules from outside say instead."""
        if step in self.dynamic:
            for operation in self.steps(step):
                if step == 'mid':
                    state.note_step(x)
                rules = asked_of(RULES, operation)
                x = rules[-1](operation, x, state) if rules else operation(x, state)
        return x

    def _mlp_on_fewer(self, x: Tensor, state: TokenState) -> Branch:
        """The MLP as a branch, on fewer tokens where a part plans that; tokens get the update of their stand-in."""
        around, first = self.steps('around'), state.first  # at most one
        plan = around[0].plan(x, state) if around else None
        if plan is None:
            return self.mlp_branch
        state.note_rows(plan)

        def branch(x: Tensor, layout: Layout) -> Tensor:
            update = self.mlp_branch(torch.cat([x[:, :first], plan.apply(x[:, first:])], dim=1), layout)
            return torch.cat([update[:, :first], plan.spread(update[:, first:])], dim=1)

        return branch

    def _before_mlp(self, state: TokenState) -> TokenState:
        """The state for attention: the rate loss asks the MLP's dispatcher about every token, read or not."""
        mlp = self.dynamic['mlp']
        if state.read is None or not (self.training and mlp.learns()):
            return state
        return state.all_read()

    def attention_branch(self, x: Tensor, layout: Layout, state: TokenState | None = None) -> Tensor:
        """The frozen attention branch without its residual connection, among the tokens that ``layout`` allows.

        With a state, tokens that stand for several count for as many, and what parts read of attention is kept there.
        """
        x = self.call('attn.norm', x)
        if layout.every_query or self.rewrites('attn.qkv'):  # which are one linear layer
            query, key, value = self.project(x, 'qkv')
            query = layout.queries(query)
        else:
            (query,), (key, value) = self.project(layout.queries(x), 'q'), self.project(x, 'kv')
        query, key, value = (self._heads(t) for t in (query, key, value))
        if state is not None and state.sizes is not None:
            layout = replace(layout, bias=state.key_bias())
        if state is not None and any(part.reads_attention for step in ('mid', 'around') for part in self.steps(step)):
            state.note_attention(query, key)
        x = attend(query, key, value, layout, self.attn_drop if self.training else 0.0)
        return self.after_attention(self.call('attn.proj', x.transpose(1, 2).flatten(2)))

    def project(self, x: Tensor, rows: str) -> tuple[Tensor, ...]:
        """Some of queries, keys and values, (B, N, C) each, rewritten where parts say so."""
        if 'attn.qkv' not in self.paths():  # linears of their own
            return tuple(self.call(name, x) for name in thirds(rows))
        if not self._rewritten and rows == 'qkv':
            return self.find('attn.qkv')(x).chunk(3, dim=-1)
        names = thirds(rows)
        by_row = any(self.rewrites(name) for name in thirds('qkv'))
        module, whole = self.find('attn.qkv'), self.rewrites('attn.qkv')
        if not by_row and (whole or rows == 'qkv'):
            found = dict(zip(thirds('qkv'), self.call('attn.qkv', x).chunk(3, dim=-1), strict=True))
            return tuple(found[name] for name in names)
        weight, bias = fold(whole, module.weight, module.bias)
        if not by_row:
            first, last = self.locate(names[0])[1].start, self.locate(names[-1])[1].stop
            bias = None if bias is None else bias[first:last]
            return F.linear(x, weight[first:last], bias).chunk(len(names), dim=-1)
        outputs = []
        for name in names:
            part = self.locate(name)[1]
            outputs.append(run_rewritten(self.rewrites(name), x, weight[part], None if bias is None else bias[part]))
        return tuple(outputs)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, H, N, D)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def mlp_branch(self, x: Tensor, layout: Layout) -> Tensor:
        """The frozen MLP branch without its residual connection, (B, N, C) -> (B, N, C)."""
        return self.feed_forward(self.call('mlp.norm', layout.queries(x)))

    def whole_layer(self, x: Tensor, layout: Layout) -> Tensor:
        """Attention and MLP as one branch: what the layer adds to ``x``.

        paper silent: the residual of layer dispatch. An inactive token keeps ``x``, so the outer residual is added
        once, outside; the MLP reads ``x`` plus the attention's update, as it does in the plain layer.
        """
        update = self.attention_branch(x, layout)
        return update + self.mlp_branch(layout.queries(x) + update, DENSE)

    def after_attention(self, x: Tensor) -> Tensor:
        """What the library does to the output projection: dropout, scale, drop path."""
        return x

    def feed_forward(self, x: Tensor) -> Tensor:
        """The library's MLP on normalised tokens, its linears through :meth:`call`."""
        raise TypeError(f'{type(self).__name__} must say how its MLP runs.')
