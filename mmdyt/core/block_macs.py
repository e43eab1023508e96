"""What a block of a Vision Transformer costs, from what its branches ran. N tokens, C width."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch.nn as nn

from .branch import BranchRun, DynamicBranch
from .macs import BesideCost, BlockCost, Count, exact, norm_macs

if TYPE_CHECKING:
    from .block import Place


class BlockMacs:
    """Mixin that counts the multiply-adds of a :class:`~mmdyt.core.block.Block`, parts included."""

    place: 'Place'
    dynamic: nn.ModuleDict

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
        numbers = {site: BranchRun(*map(exact, run[:4])) for site, run in runs.items()}
        ran = {site: run.tokens if run.beside is None else exact(run.beside) for site, run in runs.items()}
        attn, mlp = (numbers.get(site) or numbers['layer'] for site in ('attn', 'mlp'))
        cost = self.cost()
        cells = {site: exact(run.cells) for site, run in runs.items()}
        beside = sum(cost.parts(site, exact(ran[site]), run.patches, cells[site]) for site, run in numbers.items())
        steps = self._step_macs(runs['mlp']) if 'mlp' in runs else 0
        return cost.attention(attn.queries, attn.keys) + cost.mlp(mlp.queries) + beside + steps

    def _step_macs(self, mlp: BranchRun) -> Count:
        """Multiply-adds of what makes tokens fewer in front of the MLP, or around it."""
        carried = sum(part.carried() for branch in self.branches().values() for part in branch.deltas())
        steps, around, macs = self.steps('mid'), self.steps('around'), 0
        for i, (part, tokens) in enumerate(zip(steps, map(exact, mlp.before), strict=True), start=1):
            keys = any(later.reads_attention for later in (*steps[i:], *around))  # become fewer, too
            macs = macs + part.macs(tokens, mlp.prefix, carried + keys)
        return macs + sum(part.macs(exact(mlp.tokens), mlp.prefix) for part in around)

    def patches_after(self, patches: int, prefix: int) -> int:
        """How many of M patch tokens leave the block, and run its MLP, behind ``prefix`` others."""
        for part in self.steps('mid'):
            patches = part.patches_after(patches, prefix)
        return patches

    def tokens_leave(self, patches: int, prefix: int) -> bool:
        """Whether cells of M patch tokens lose their token here."""
        for part in self.steps('mid'):
            after = part.patches_after(patches, prefix)
            if part.leaves and after < patches:
                return True
            patches = after
        return False

    def dense_macs(self, tokens: Count) -> Count:
        """Multiply-adds of the plain block without any part, all tokens active."""
        linears = sum(module.weight.numel() for module in self.frozen().values() if isinstance(module, nn.Linear))
        return tokens * linears + norm_macs(2 * tokens, self.place.dim) + 2 * tokens**2 * self.place.dim

    def expected(
        self,
        tokens: int,
        prefix: int,
        active: Mapping[str, Count],
        read: int | None = None,
        cells: Sequence[int] = (0, 0),
    ) -> dict[str, BranchRun]:
        """What a pass of inference will run.

        Args:
            tokens: N, incl. prefix tokens and prompts.
            prefix: These.
            active: Active tokens incl. these of the branches that are dispatched, by site; the others run all.
            read: Leading tokens whose result is wanted; None is all.
            cells: Cells without a token of their own for which adapters run, beside attention and beside the MLP.
        """
        runs, before, left = {}, [], (tokens if read is None else read) - prefix
        for part in self.steps('mid'):
            before.append(read if read is not None else prefix + left)
            left = part.patches_after(left, prefix)
        for site, branch in self.branches().items():
            reaching = tokens if site != 'mlp' or read is not None else prefix + left
            ran, all_keys = active.get(site, reaching), branch.keys == 'all'
            reaches = reaching if read is None or site != 'mlp' else read
            asked = 0 if branch.dispatcher is None else max(reaches - prefix, 0)
            if read is not None and all_keys:  # nothing to decide
                asked = 0
            wanted, seen = ran if read is None else read, reaching if all_keys else ran
            if site == 'mlp' and read is None:
                for part in self.steps('around'):
                    wanted = prefix + part.rows(wanted - prefix, prefix)
            there = dict(prefix=prefix if read is None else read, before=tuple(before), cells=cells[site == 'mlp'])
            there['beside'] = wanted if branch.stops else None
            runs[site] = BranchRun(reaching if read is None else read, asked, wanted, seen, **there)
        return runs


def _beside(branch: DynamicBranch) -> BesideCost:
    """What the parts beside a branch cost."""
    deltas, dispatcher = branch.deltas(), branch.dispatcher
    return BesideCost(
        token=sum(part.macs_per_token() for part in deltas),
        patch=0 if dispatcher is None else dispatcher.macs_per_token(),
        cell=sum(part.macs_alone() for part in (*branch.deltas('parallel'), *branch.deltas('serial'))),
        image=sum(part.macs_per_image() for part in deltas),
        asked=0 if dispatcher is None else dispatcher.macs_per_image(),
    )
