"""Report how alike decisions about tokens are that should be: neighbours, windows that overlap, flips, frames."""

import copy
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from mmengine.dist import all_gather_object
from mmengine.runner.amp import autocast
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmdyt.core.observe import dynamic_branches, unrecorded
from mmdyt.core.options import check_switches
from mmdyt.engine.evaluation import EvaluationHook
from mmdyt.engine.host import find_host, is_recognizer
from mmdyt.engine.maps import MapRecorder, SampleMap
from mmdyt.engine.own_images import OwnSamples
from mmdyt.registry import HOOKS


@HOOKS.register_module()
class ConsistencyHook(EvaluationHook):
    """Add to the metrics of validation and test which share of decisions agrees where one would like them to.

    Adds, where there is such a thing, means over the images or clips: ``consistency/neighbours`` (pairs of tokens
    beside or above each other), ``consistency/windows`` (the area that two windows of a sliding test both show),
    ``consistency/flip`` (an image and its flip: with test-time augmentation, or ``flip=True``), ``consistency/time``
    (tokens of two frames in turn). All branches count alike. Chance would give r^2 + (1 - r)^2 at a rate r.

    Args:
        flip: Whether each image runs a second time, flipped from left to right; not within test-time augmentation, nor
            clips. What this costs is in no other report.

    Raises:
        ValueError: If an argument is no bool, or, before work starts, if the model has no dispatchers.
    """

    priority = 'LOW'  # after the hooks that count

    def __init__(self, flip: bool = False):
        check_switches(flip=flip)
        self._flip = flip
        self._open = ExitStack()

    def before_run(self, runner) -> None:
        """Refuse a model in which nothing is dispatched."""
        if not dynamic_branches(runner.model):
            raise ValueError('model must have dispatchers for mmdyt.ConsistencyHook, got none.')

    def begin(self, runner, mode: str) -> None:
        """Start to look."""
        self._open.close()  # a former evaluation may have been cut short
        self._own = OwnSamples(getattr(runner, f'{mode}_dataloader', None))
        self._loop = getattr(runner, f'{mode}_loop', None)
        self._found: list[dict[str, float]] = []
        self._recorder = self._open.enter_context(MapRecorder(runner.model))

    def see(self, runner, batch_idx: int, data_batch, outputs) -> None:
        """Compare what was decided in the batch."""
        maps = self._recorder.take()
        augmented = isinstance(data_batch['inputs'][0], list | tuple)  # whose flips are compared as they are
        if self._flip and maps and not augmented and not is_recognizer(find_host(runner.model)):
            with unrecorded(), autocast(enabled=getattr(self._loop, 'fp16', False)):  # so that nobody counts these
                flipped = flipped_maps(runner.model, data_batch)
            maps = [found.with_looks_of(other) for found, other in zip(maps, flipped, strict=True)]
        self._found += [found.consistency() for found in maps[: self._own.of(len(maps))]]

    def finish(self, runner, metrics: dict | None, mode: str) -> None:
        """Into the log and the metrics."""
        self._open.close()
        found = [one for part in all_gather_object(self._found) for one in part]
        report = {f'consistency/{name}': mean for name, mean in means(found).items()}
        shares = ', '.join(f'{name.split("/")[1]} {value:.3f}' for name, value in report.items())
        runner.logger.info(f'Decisions that agree: {shares}.')
        self.publish(runner, report, metrics, mode)


def means(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each figure over the samples that have it."""
    names = dict.fromkeys(name for one in found for name in one)
    values = {name: [one[name] for one in found if name in one] for name in names}
    return {name: sum(one) / len(one) for name, one in values.items()}


@torch.no_grad()
def flipped_maps(model: torch.nn.Module, batch: dict) -> list[SampleMap]:
    """What is decided about the images of a batch that are flipped from left to right.

    Args:
        model: A host model, also in a wrapper.
        batch: As the data loader gave it, without test-time augmentation.
    """
    host = find_host(model)
    inputs, samples = batch['inputs'], batch.get('data_samples')
    flipped = inputs.flip(-1) if isinstance(inputs, Tensor) else [image.flip(-1) for image in inputs]
    with MapRecorder(host) as recorder:
        host.test_step(dict(inputs=flipped, data_samples=[_flipped(sample) for sample in samples]))
    return recorder.take()


def _flipped(sample: BaseDataElement) -> BaseDataElement:
    """A sample without annotations whose meta says that it is flipped."""
    found = type(sample)(metainfo=copy.deepcopy(sample.metainfo))
    found.set_metainfo(dict(flip=True, flip_direction='horizontal'))
    return found
