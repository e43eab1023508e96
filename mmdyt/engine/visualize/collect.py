"""Gather, while a host model is tested, what pictures of its dispatch are drawn from."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import numpy as np
import torch
import torch.nn as nn
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmdyt.core.executors import runs_all
from mmdyt.core.observe import dynamic_branches
from mmdyt.engine.costs import GIGA, CostCounter
from mmdyt.engine.host import branch_labels, find_host, is_recognizer
from mmdyt.engine.maps import MapRecorder, SampleMap
from mmdyt.engine.visualize.sample import LayerCost, SampleDispatch

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
NOTHING = 'model must have dispatchers, or parts that make tokens fewer, which see patch tokens, got none:'
JUMP = 1e-9  # of a share, on both sides of where the cost jumps


class Collector:
    """Within its context, gives a :class:`~mmdyt.engine.visualize.sample.SampleDispatch` for each sample of a batch.

    Args:
        model: A host model, also in a wrapper.
        classes: Names of the classes; empty where there are none.
        palette: Their colours, red first.
        name: Of the i-th sample, where its predictions do not tell.

    Raises:
        TypeError: If its backbone is none of mmdyt's.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: Sequence[str] = (),
        palette: Sequence[Sequence[int]] = (),
        name: Callable[[int], str] = 'sample {}'.format,
    ):
        self._host = find_host(model)
        self._recorder, self._counter = MapRecorder(model), CostCounter(model, name=name)
        self._about = dict(classes=tuple(classes or ()), palette=list(palette or ()))
        self._known: dict[tuple, list[LayerCost]] = {}
        self._open = ExitStack()

    def __enter__(self) -> 'Collector':
        self._open.enter_context(self._recorder)
        self._open.enter_context(self._counter)
        return self

    def __exit__(self, *error) -> None:
        self._open.close()

    def take(
        self, batch: dict, outputs: Sequence[BaseDataElement], wanted: Sequence[int] | None = None
    ) -> list[SampleDispatch]:
        """Of a batch that the model has just predicted.

        Args:
            batch: As the data loader gave it: ``inputs`` are the pictures.
            outputs: What the model predicted.
            wanted: Places in the batch of the samples that are wanted; None is all. The others cost little.
        """
        self._counter.add_samples(outputs)
        lines = self._counter.take().lines()
        maps = self._recorder.take()
        if not maps:
            raise ValueError(f'{NOTHING} there is nothing to draw.')
        return self.describe(batch, outputs, lines, maps, wanted)

    def describe(
        self,
        batch: dict,
        outputs: Sequence[BaseDataElement],
        lines: Sequence[dict],
        maps: Sequence[SampleMap],
        wanted: Sequence[int] | None = None,
    ) -> list[SampleDispatch]:
        """Of a batch that somebody else has watched.

        Args:
            batch: As of :meth:`take`.
            outputs: As of :meth:`take`.
            lines: What each sample cost, as of :meth:`mmdyt.engine.costs.Costs.lines`.
            maps: What was decided about each, as of :meth:`mmdyt.engine.maps.MapRecorder.take`.
            wanted: As of :meth:`take`.
        """
        inputs, wanted = _of_samples(batch['inputs']), range(len(outputs)) if wanted is None else wanted
        return [self._sample(maps[i], lines[i], outputs[i], self._pictures(inputs[i])) for i in wanted]

    def _sample(self, found: SampleMap, line: dict, output: BaseDataElement, pictures: list) -> SampleDispatch:
        logits = found.logits()
        masks = found.activation().numpy()
        view = found.looks[0].seen.view
        extent = [n * side / whole for n, side, whole in zip(view.cells, view.patch, view.image, strict=True)]
        costs, rates = self._costs(found), [line['rates'].get(layer, np.nan) for layer in found.layers]
        rates = masks.reshape(len(masks), -1).mean(1) if np.isnan(rates).any() else np.array(rates)
        gmacs = np.nan if line['gmacs'] is None else line['gmacs']
        # where nothing decides, no other rate can be asked for
        costed = zip(costs, rates, strict=True) if costs else ()
        decided = sum(np.interp(rate, *zip(*one.points, strict=True)) for one, rate in costed)
        return SampleDispatch(
            name=line['file'],
            layers=found.layers,
            masks=masks,
            pictures=pictures,
            extent=tuple(extent),
            gmacs=gmacs,
            gmacs_rest=gmacs - float(decided) / GIGA,
            run_rates=rates,
            gmacs_dense=line['gmacs_dense'],
            logits=None if logits is None else logits.numpy(),
            costs=costs,
            **_outcome(output, pictures[0].shape[:2]),
            **self._about,
        )

    def _costs(self, found: SampleMap) -> list[LayerCost]:
        """Multiply-adds of each branch over all passes, as a function of its rate, the others alike."""
        passes: dict[tuple[int, int], int] = {}
        for look in found.looks:
            _, frames, *grid = look.masks.shape
            size = tuple(cells * side for cells, side in zip(grid, look.seen.view.patch, strict=True))
            passes[size] = passes.get(size, 0) + frames
        key = tuple(passes.items()), tuple(found.layers)
        if key not in self._known:
            self._known[key] = self._costs_of(passes, found.layers)
        return self._known[key]

    def _costs_of(self, passes: dict[tuple[int, int], int], layers: Sequence[str]) -> list[LayerCost]:
        """As above, for a number of passes of each size, in pixels."""
        backbone = self._host.backbone
        branches = dynamic_branches(backbone)
        if not branches:
            return []
        names = {label: name for name, label in branch_labels(list(branches)).items()}
        prefixes, costs = backbone.prefixes(), []
        for label in layers:
            name, prefix = names[label], prefixes[int(names[label].split('.')[1])]
            break_even = branches[name].break_even
            patches = {size: backbone.patches_of(*size)[name] for size in passes}
            points = dict.fromkeys(_shares(prefix, patches.values(), break_even), 0.0)
            for size, number in passes.items():
                active, tokens = [prefix + share * patches[size] for share in points], prefix + patches[size]
                ran = [tokens if runs_all(count, tokens, break_even) else count for count in active]
                macs = [float(backbone.macs(*size, {name: count})) for count in ran]
                for share, cost in zip(points, macs, strict=True):
                    points[share] += number * (cost - macs[0])
            costs.append(LayerCost(label, tuple(points.items())))
        return costs

    def _pictures(self, inputs: Tensor) -> list[np.ndarray]:
        """Pictures, blue first, of an image (3, H, W) or of the frames of the first view of a clip (V, 3, T, H, W)."""
        if inputs.dim() == 5:
            inputs = inputs[0]
        frames = inputs.unsqueeze(1) if inputs.dim() == 3 else inputs
        pictures = frames.permute(1, 2, 3, 0).cpu()
        if pictures.is_floating_point():
            low, high = pictures.amin(), pictures.amax()
            pictures = (255 * (pictures - low) / (high - low).clamp(min=1e-12)).round()
        pictures = pictures.to(torch.uint8).numpy()
        return [np.ascontiguousarray(one[..., ::-1] if self._red_first() else one) for one in pictures]

    def _red_first(self) -> bool:
        """Whether pipelines of the host load pictures with red first."""
        preprocessor = self._host.data_preprocessor
        return is_recognizer(self._host) or getattr(preprocessor, 'to_rgb', True) is False


def _shares(prefix: int, patches: Iterable[int], break_even: float | None) -> list[float]:
    """Shares of active patch tokens between which the cost is nearly linear: it jumps where all tokens run at once.

    Args:
        prefix: Tokens that are always active.
        patches: Patch tokens of the passes.
        break_even: Share of all tokens from which on all run; None is never.
    """
    jumps = [] if break_even is None else [(break_even * (prefix + number) - prefix) / number for number in patches]
    around = (jump + side for jump in jumps for side in (-JUMP, JUMP))
    return sorted({*SHARES, *(share for share in around if 0 < share < 1)})


def _of_samples(inputs) -> list[Tensor]:
    """The input of each sample; of an augmented test, that of the first augmentation."""
    first = inputs[0]
    return list(first) if isinstance(first, list | tuple) else list(inputs)


def _outcome(output: BaseDataElement, size: tuple[int, int]) -> dict:
    """Prediction, truth and scores of a sample, in the words of any of the three hosts."""
    if 'pred_sem_seg' in output:
        maps = dict(prediction='pred_sem_seg', truth='gt_sem_seg')
        return {word: _resized(output.get(name).data, size) for word, name in maps.items() if name in output}
    found = {}
    for word, name in dict(prediction='pred_label', truth='gt_label').items():
        label = output.get(name)
        if isinstance(label, Tensor) and label.numel() == 1 and int(label) >= 0:
            found[word] = int(label)
    scores = output.get('pred_score')
    if isinstance(scores, Tensor) and scores.numel() == scores.shape[-1]:  # of several views each may have its own
        found['scores'] = scores.flatten().float().cpu().numpy()
    return found


def _resized(labels: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Class indices (1, h, w) as (H, W), without mixing classes."""
    labels = labels[None].float().cpu()
    return torch.nn.functional.interpolate(labels, size, mode='nearest')[0, 0].to(torch.int64).numpy()
