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
from .branch import BranchRun, DynamicBranch
from .executors import Branch
from .macs import BesideCost, BlockCost, Count, exact, norm_macs
from .part import STEPS, TokenOp
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


class Block(Rewritable, nn.Module):
    """A frozen block with rooms for parts; a library's layer names its modules and calls :meth:`open`.

    ``dynamic`` holds a :class:`~mmdyt.core.branch.DynamicBranch` for attention and MLP, one around both where the whole
    layer is dispatched, and the token operations of each step. A library's layer defines :meth:`paths`,
    :meth:`feed_forward` and :meth:`after_attention`.
    """

    place: Place
    dispatch: str
    num_heads: int
    attn_drop: float

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
        """(B, N, C) -> (B, N', C), or (B, read, C) where the state says so."""
        state = TokenState(self.place.prefix) if state is None else state
        x = self.run('enter', x, state)
        if 'layer' in self.dynamic:
            x = self.dynamic['layer'](x, self.whole_layer, state)
            state.prompts *= state.read is None  # else what is read is all that is left
        else:
            before = self._before_mlp(state)
            x = self.dynamic['attn'](x, partial(self.attention, state=state), before)
            state.prompts *= before.read is None  # as above
            x = self.run('mid', x, state)
            x = self.dynamic['mlp'](x, self._mlp_on_fewer(x, state), state)
            state.note_attention(None, None)
        return self.run('leave', x, state)

    def run(self, step: str, x: Tensor, state: TokenState) -> Tensor:
        """Apply the token operations of a step."""
        if step in self.dynamic:
            for operation in self.steps(step):
                x = operation(x, state)
        return x

    def _mlp_on_fewer(self, x: Tensor, state: TokenState) -> Branch:
        """The MLP as a branch, on fewer tokens where a part plans that; tokens get the update of their stand-in."""
        plans = [plan for part in self.steps('around') if (plan := part.plan(x, state)) is not None]
        if not plans:
            return self.mlp
        (plan,), first = plans, state.first

        def branch(x: Tensor, layout: Layout) -> Tensor:
            update = self.mlp(torch.cat([x[:, :first], plan.apply(x[:, first:])], dim=1), layout)
            return torch.cat([update[:, :first], plan.spread(update[:, first:])], dim=1)

        return branch

    def _before_mlp(self, state: TokenState) -> TokenState:
        """The state for attention: the rate loss asks the MLP's dispatcher about every token, read or not."""
        mlp = self.dynamic['mlp']
        if state.read is None or not (self.training and mlp.learns()):
            return state
        return state.all_read()

    def attention(self, x: Tensor, layout: Layout, state: TokenState | None = None) -> Tensor:
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

    def mlp(self, x: Tensor, layout: Layout) -> Tensor:
        """The frozen MLP branch without its residual connection, (B, N, C) -> (B, N, C)."""
        return self.feed_forward(self.call('mlp.norm', layout.queries(x)))

    def whole_layer(self, x: Tensor, layout: Layout) -> Tensor:
        """Attention and MLP as one branch: what the layer adds to ``x``.

        paper silent: the residual of layer dispatch. An inactive token keeps ``x``, so the outer residual is added
        once, outside; the MLP reads ``x`` plus the attention's update, as it does in the plain layer.
        """
        update = self.attention(x, layout)
        return update + self.mlp(layout.queries(x) + update, DENSE)

    def cost(self) -> BlockCost:
        """What this block costs for each of what it may run, parts included."""
        query, key = self._linear_macs('attn.proj'), norm_macs(1, self.place.dim)
        key += self._linear_macs('attn.k') + self._linear_macs('attn.v')
        if whole := self.rewrites('attn.qkv'):
            key += self._linear_macs('attn.q') + sum(part.macs_per_token() for part in whole)
        else:
            query += self._linear_macs('attn.q')
        mlp = [name for name, m in self.frozen().items() if name.startswith('mlp.') and isinstance(m, nn.Linear)]
        row = sum(self._linear_macs(name) for name in mlp) + norm_macs(1, self.place.dim)
        beside = {site: _beside(branch) for site, branch in self.branches().items()}
        return BlockCost(self.place.dim, query, key, row, beside)

    def token_macs(self, site: str, tokens: int, read: int | None = None) -> int:
        """Multiply-adds that one patch token saves which skips a branch; parts beside it run on.

        Args:
            site: Of the branch.
            tokens: N, all of which run it.
            read: Leading tokens whose result is wanted; others are keys only. None is all.
        """
        cost, queries = self.cost(), tokens if read is None else read
        key = cost.key + 2 * queries * self.place.dim if self.dynamic[site].keys == 'active' else 0
        if read is not None:
            return key
        attention = cost.query + 2 * tokens * self.place.dim + key
        return sum(dict(attn=[attention], mlp=[cost.row], layer=[attention, cost.row])[site])

    def _linear_macs(self, name: str) -> int:
        """Multiply-adds of a linear layer for each token, with those of its rewrites."""
        out_features, in_features = self.widths(name)
        return out_features * in_features + sum(part.macs_per_token() for part in self.rewrites(name))

    def macs(self, runs: Mapping[str, BranchRun]) -> Count:
        """Multiply-adds of one pass for each image, from what the branches ran, by site."""
        runs = {site: BranchRun(*map(exact, run[:4]), prefix=run.prefix) for site, run in runs.items()}
        attn, mlp = (runs.get(site) or runs['layer'] for site in ('attn', 'mlp'))
        cost = self.cost()
        beside = sum(cost.parts(site, run.tokens, run.patches) for site, run in runs.items())
        carried = sum(part.carried() for branch in self.branches().values() for part in branch.deltas())
        tokens, steps, operations = attn.tokens, 0, [part for step in STEPS for part in self.steps(step)]
        for i, part in enumerate(operations, start=1):
            keys = any(later.reads_attention for later in operations[i:])  # become fewer, too
            steps = steps + part.macs(tokens, attn.prefix, carried + keys)
            tokens = attn.prefix + part.patches_after(tokens - attn.prefix, attn.prefix)
        rows = mlp.queries
        for part in self.steps('around'):
            rows = mlp.prefix + part.rows(rows - mlp.prefix, mlp.prefix)
        return cost.attention(attn.queries, attn.keys) + cost.mlp(rows) + beside + steps

    def patches_after(self, patches: int, prefix: int) -> int:
        """How many of M patch tokens leave the block, and run its MLP, behind ``prefix`` others."""
        for step in STEPS:
            for part in self.steps(step):
                patches = part.patches_after(patches, prefix)
        return patches

    def dense_macs(self, tokens: Count) -> Count:
        """Multiply-adds of the plain block without any part, all tokens active."""
        linears = sum(module.weight.numel() for module in self.frozen().values() if isinstance(module, nn.Linear))
        return tokens * linears + norm_macs(2 * tokens, self.place.dim) + 2 * tokens**2 * self.place.dim

    def expected(
        self, tokens: int, prefix: int, active: Mapping[str, Count], read: int | None = None
    ) -> dict[str, BranchRun]:
        """What a pass of inference will run.

        Args:
            tokens: N, incl. prefix tokens and prompts.
            prefix: These.
            active: Active tokens incl. these of the branches that are dispatched, by site; the others run all.
            read: Leading tokens whose result is wanted; None is all.
        """
        runs, reaching = {}, tokens
        for site, branch in self.branches().items():
            tokens = prefix + self.patches_after(reaching - prefix, prefix) if site == 'mlp' else reaching
            ran, all_keys = active.get(site, tokens), branch.keys == 'all'
            reaches = tokens if read is None or site != 'mlp' else read
            asked = 0 if branch.dispatcher is None else max(reaches - prefix, 0)
            if read is not None and all_keys:  # nothing to decide
                asked = 0
            wanted, seen = ran if read is None else read, tokens if all_keys else ran
            runs[site] = BranchRun(tokens if read is None else read, asked, wanted, seen, prefix=prefix)
        return runs

    def after_attention(self, x: Tensor) -> Tensor:
        """What the library does to the output projection: dropout, scale, drop path."""
        return x

    def feed_forward(self, x: Tensor) -> Tensor:
        """The library's MLP on normalised tokens, its linears through :meth:`call`."""
        raise TypeError(f'{type(self).__name__} must say how its MLP runs.')


def _beside(branch: DynamicBranch) -> BesideCost:
    """What the parts beside a branch cost."""
    deltas, dispatcher = branch.deltas(), branch.dispatcher
    return BesideCost(
        token=sum(part.macs_per_token() for part in deltas),
        patch=0 if dispatcher is None else dispatcher.macs_per_token(),
        image=sum(part.macs_per_image() for part in [*deltas, *([dispatcher] if dispatcher is not None else [])]),
    )
