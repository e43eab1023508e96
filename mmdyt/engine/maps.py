"""Which tokens of each sample ran which branch, in the coordinates of the image. L branches, T frames."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations

import torch
import torch.nn as nn
from torch import Tensor

from mmdyt.core.grid import DispatchMap, agreement, neighbours_alike
from mmdyt.core.observe import record_dispatch
from mmdyt.core.views import Seen, ViewTracker
from mmdyt.engine.host import branch_labels, find_host


@dataclass
class Look:
    """What was decided in one view of a sample.

    Attributes:
        seen: What it shows.
        masks: (L, T, rows, columns), 0 or 1; between them where tokens merged.
        logits: (L, T, rows, columns); None where a rule from outside decided.
    """

    seen: Seen
    masks: Tensor
    logits: Tensor | None

    def without_padding(self) -> Tensor:
        """The masks of cells that show some of the image."""
        down, along = (edges[:, 1] > edges[:, 0] for edges in self.seen.view.edges(tuple(self.masks.shape[-2:])))
        return self.masks[..., down, :][..., along]


@dataclass
class SampleMap:
    """All that was decided about one image or clip.

    Attributes:
        layers: Names of the L branches that saw patch tokens: with ``skip_unread`` the last one may see none.
        looks: One for each window, augmentation or view, in the order in which they ran.
    """

    layers: Sequence[str]
    looks: list[Look] = field(default_factory=list)

    def _whole(self, view: int, of: str) -> Tensor | None:
        """Mean over the looks at one view of a clip, or at the image: (L, T, H', W')."""
        looks = [look for look in self.looks if look.seen.number == view]
        if any(getattr(look, of) is None for look in looks):
            return None
        first = looks[0].seen.view
        whole = DispatchMap(first.image, first.patch)
        for look in looks:
            whole.add(getattr(look, of), look.seen.view)
        return whole.mean()

    @property
    def views(self) -> int:
        """How many views of a clip there are; 1 for images."""
        return 1 + max(look.seen.number for look in self.looks)

    def activation(self, view: int = 0) -> Tensor:
        """Share of what was seen of each cell that was active, (L, T, H', W') in [0, 1].

        Args:
            view: Of a clip; windows, flips and scales of an image are averaged.
        """
        return self._whole(view, 'masks')

    def logits(self, view: int = 0) -> Tensor | None:
        """Mean logits of each cell, as :meth:`activation`; None where a rule from outside decided."""
        return self._whole(view, 'logits')

    def consistency(self) -> dict[str, float]:
        """How alike decisions are that should be: shares in [0, 1], means over the branches that saw patch tokens.

        Returns:
            ``neighbours``: of pairs of tokens beside or above each other; ``windows``: of the area that two windows
            both show; ``flip``: of the area that a view and a flipped one of the same size both show; ``time``: of the
            tokens of two frames in turn. Only what there is.
        """
        alike = [neighbours_alike(look.without_padding()).nanmean().item() for look in self.looks]
        alike = [share for share in alike if not math.isnan(share)]  # windows in padding have no neighbours
        found = dict(neighbours=_mean(alike)) if alike else {}
        pairs = [pair for pair in combinations(self.looks, 2) if pair[0].seen.number == pair[1].seen.number]
        same = [p for p in pairs if p[0].seen.view.image == p[1].seen.view.image]
        for name, wanted in dict(windows=True, flip=False).items():
            of_kind = [p for p in same if (p[0].seen.view.flip == p[1].seen.view.flip) is wanted]
            shares = [agreement(a.masks, a.seen.view, b.masks, b.seen.view) for a, b in of_kind]
            areas = sum(area for _, area in shares)
            if areas:
                found[name] = sum(share.mean().item() * area for share, area in shares if area) / areas
        if self.looks[0].masks.shape[1] > 1:
            clips = [look.masks for look in self.looks]
            found['time'] = _mean([(clip[:, 1:] == clip[:, :-1]).double().mean().item() for clip in clips])
        return found

    def with_looks_of(self, other: 'SampleMap') -> 'SampleMap':
        """The same sample, also as other passes saw it."""
        return SampleMap(self.layers, [*self.looks, *other.looks])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class MapRecorder:
    """Records, within its context, what is decided about each sample that a host model predicts.

    Args:
        model: A host model, also in a wrapper.

    Raises:
        TypeError: If its backbone is none of mmdyt's.
    """

    def __init__(self, model: nn.Module):
        self._host = find_host(model)
        self._looks: dict[int, list[Look]] = {}
        self._layers: list[str] = []
        self._open = ExitStack()

    def __enter__(self) -> 'MapRecorder':
        backbone = self._host.backbone
        self._record = self._open.enter_context(record_dispatch(backbone))
        self._tracker = ViewTracker(self._host)
        before = self._host.register_forward_pre_hook(self._begin, with_kwargs=True)
        after = backbone.register_forward_hook(self._look)
        for handle in (before, after):
            self._open.callback(handle.remove)
        return self

    def __exit__(self, *error) -> None:
        self._open.close()

    def _begin(self, host: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self._record.here:  # another thread uses the model
            return
        inputs = kwargs.get('inputs', args[0] if args else None)
        samples = kwargs.get('data_samples', args[1] if len(args) > 1 else None)
        self._tracker.begin(inputs, samples)

    @torch.no_grad()
    def _look(self, backbone: nn.Module, args: tuple, features: tuple[Tensor, ...]) -> None:
        """Keep the masks of one pass, row by row."""
        if not self._record.here:  # another thread uses the model
            return
        batch, _, *frames, height, width = args[0].shape
        grid = backbone.grid(height, width)
        decided = dict(zip(self._record.names, self._record.flat(), strict=True))
        self._record.clear()
        decided = {name: dispatch for name, dispatch in decided.items() if dispatch.patch_mask.shape[1]}
        labels = branch_labels(self._record.names)
        self._layers = [labels[name] for name in decided]
        if not decided:
            return
        shape = (len(decided), batch, frames[0] if frames else 1, *grid)
        masks = torch.stack([d.took_part() for d in decided.values()]).view(shape).cpu()
        logits = [d.logits if d.logits is None else d.on_patches(d.logits, torch.nan) for d in decided.values()]
        told = all(of_branch is not None for of_branch in logits)
        logits = torch.stack([of_branch.float() for of_branch in logits]).view(shape).cpu() if told else None
        for row, seen in enumerate(self._tracker.rows(batch)):
            look = Look(seen, masks[:, row], None if logits is None else logits[:, row])
            self._looks.setdefault(seen.sample, []).append(look)

    def take(self) -> list[SampleMap]:
        """Of the samples since the last call: those of one batch, with all their augmentations."""
        looks, self._looks = self._looks, {}
        return [SampleMap(self._layers, looks[i]) for i in sorted(looks)]
