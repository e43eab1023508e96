"""What a Vision Transformer of blocks costs, as the sum of what its blocks ran."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from mmdyt.core.branch import BranchRun
from mmdyt.core.executors import runs_all
from mmdyt.core.macs import Count, exact, norm_macs
from mmdyt.core.restoring import ADAPT


class ViTMacs:
    """Mixin that counts the multiply-adds of mmpretrain's ``VisionTransformer`` whose ``layers`` are blocks.

    A layer costs what its branches ran: tokens, queries, keys and rows of the MLP, so layers may differ in any way.
    """

    skip_unread: bool
    restore: str
    num_prefix_tokens: int

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the patch tokens of an image of ``height`` x ``width`` pixels, padding included."""
        conv, pad = self.patch_embed.projection, self.patch_embed.adaptive_padding
        pad_h, pad_w = pad.get_pad_shape((height, width)) if pad else (0, 0)
        sides = zip((height + pad_h, width + pad_w), conv.kernel_size, conv.stride, conv.padding, strict=True)
        return tuple((side + 2 * p - k) // s + 1 for side, k, s, p in sides)

    def num_patches(self, height: int, width: int) -> int:
        """Patch tokens N of an image of ``height`` x ``width`` pixels, padding included."""
        rows, columns = self.grid(height, width)
        return rows * columns

    def macs(self, height: int, width: int, active: Mapping[str, Count]) -> Count:
        """MACs of an image of ``height`` x ``width`` pixels in inference, from counts of active tokens.

        Args:
            height: Pixels.
            width: Pixels.
            active: Active tokens incl. prefix and prompts of each dispatched branch by module name, e.g.
                ``layers.0.dynamic.mlp``; a tensor holds one count per image. Branches that are not named run all.

        Raises:
            ValueError: If an entry of ``active`` is no possible count.
        """
        patches = left = self.num_patches(height, width)
        runs, cells = {}, (0, 0)
        adapted = self.restore == ADAPT and self.out_type != 'cls_token'
        for i, (layer, prefix) in enumerate(zip(self.layers, self.prefixes(), strict=True)):
            read = self.num_prefix_tokens if self.skip_unread and i == self.num_layers - 1 else None
            names = {site: f'layers.{i}.dynamic.{site}' for site in layer.branches()}
            counts = {site: active[name] for site, name in names.items() if name in active}
            _check_counts(counts.values(), left + prefix)
            cells = (cells[1], patches if adapted and (cells[1] or layer.tokens_leave(left, prefix)) else 0)
            found = layer.expected(left + prefix, prefix, counts, read, cells)
            runs |= {names[site]: run for site, run in found.items()}
            left = layer.patches_after(left, prefix)
        return self.macs_of(patches, runs)

    def macs_at(self, height: int, width: int, rate: float) -> Count:
        """MACs of an image of ``height`` x ``width`` pixels in inference, the same rate in every dispatched branch."""
        patches, active = self.patches_of(height, width), {}
        for i, (layer, prefix) in enumerate(zip(self.layers, self.prefixes(), strict=True)):
            for site, branch in layer.branches().items():
                if branch.dispatcher is not None and branch.inference != 'masked':
                    number = patches[f'layers.{i}.dynamic.{site}']
                    ran = _ran(prefix + rate * number, prefix + number, branch.break_even)
                    active[f'layers.{i}.dynamic.{site}'] = ran
        return self.macs(height, width, active)

    def patches_of(self, height: int, width: int) -> dict[str, int]:
        """Patch tokens that reach each branch, by module name, of an image of ``height`` x ``width`` pixels."""
        left, found = self.num_patches(height, width), {}
        for i, (layer, prefix) in enumerate(zip(self.layers, self.prefixes(), strict=True)):
            after = layer.patches_after(left, prefix)
            for site in layer.branches():
                found[f'layers.{i}.dynamic.{site}'] = after if site == 'mlp' else left
            left = after
        return found

    def prefixes(self) -> list[int]:
        """Leading tokens that are no patches in each layer: the host's, and prompts."""
        prefix, found = self.num_prefix_tokens, []
        for layer in self.layers:
            for part in layer.steps('enter'):
                prefix = self.num_prefix_tokens + part.prompts() if part.prompts() else prefix
            found.append(prefix)
        return found

    def macs_of(self, patches: Count, runs: Mapping[str, BranchRun]) -> Count:
        """MACs of an image from what the branches ran, by module name: the sum over the layers and what is around.

        Args:
            patches: Patch tokens N, without those in padding.
            runs: Of one forward pass, as :func:`mmdyt.core.observe.record_dispatch` sees them.
        """
        total = self._outside_macs(patches, self._read_of(runs))
        for i, layer in enumerate(self.layers):
            total = total + layer.macs({site: runs[f'layers.{i}.dynamic.{site}'] for site in layer.branches()})
        return total

    def _read_of(self, runs: Mapping[str, BranchRun]) -> Count | None:
        """Tokens that the final norm reads where these became fewer and are not restored; None is all."""
        if self.out_type != 'cls_token':
            return None
        last = [runs[f'layers.{self.num_layers - 1}.dynamic.{site}'] for site in self.layers[-1].branches()][-1]
        return exact(last.tokens) - max(last.prefix - self.num_extra_tokens, 0)  # without registers and prompts

    def _outside_macs(self, patches: Count, read: Count | None = None) -> Count:
        """MACs of patch embedding, norms outside the layers, and pooled norms; ``read`` tokens reach the final one."""
        tokens = patches + self.num_extra_tokens
        embed = patches * self.patch_embed.projection.weight.numel()
        final = self.num_extra_tokens if self.skip_unread else tokens if read is None else read
        entering = patches + self.num_prefix_tokens
        norms = int(self.final_norm) * final + int(not isinstance(self.pre_norm, nn.Identity)) * entering
        pooled = int(self.out_type == 'avg_featmap') * len(self.out_indices)
        return embed + norm_macs(norms + pooled, self.embed_dims)

    def dense_macs(self, height: int, width: int, padding: Count = 0) -> Count:
        """MACs of the plain ViT on an image of ``height`` x ``width`` pixels: no parts, every token runs.

        Args:
            height: Pixels.
            width: Pixels.
            padding: Patch tokens of each image that lie wholly in padding, and do not count.
        """
        patches = self.num_patches(height, width) - exact(padding)
        tokens = patches + self.num_prefix_tokens
        skipped = norm_macs(patches, self.embed_dims) if self.skip_unread else 0
        skipped *= int(self.final_norm)
        return self._outside_macs(patches) + skipped + sum(layer.dense_macs(tokens) for layer in self.layers)


def _ran(active: float, tokens: int, break_even: float | None) -> float:
    """How many of N tokens run a branch when some are active."""
    return tokens if runs_all(active, tokens, break_even) else active


def _check_counts(counts: Iterable[Count], tokens: int) -> None:
    """Refuse counts of tokens that are impossible."""
    for count in counts:
        low, high = (count.min(), count.max()) if isinstance(count, Tensor) else (count, count)
        if not (low >= 0 and high <= tokens):
            raise ValueError(
                f'active must hold counts in [0, {tokens}], got {low:g} to {high:g}. They include prefix tokens.'
            )
