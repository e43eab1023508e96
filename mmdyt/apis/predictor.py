"""A loaded model that predicts images or clips, and says what each cost."""

import copy
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn as nn
from mmengine.dataset import pseudo_collate

from mmdyt.core.options import is_integer, is_number
from mmdyt.engine.costs import CostCounter
from mmdyt.engine.host import is_recognizer
from mmdyt.engine.maps import MapRecorder, SampleMap
from mmdyt.engine.visualize.collect import Collector
from mmdyt.engine.visualize.where import mean_map
from mmdyt.files import BadFileError

from .prediction import Prediction, Skipped, scored, segmentation_of
from .rates import RateControl
from .reading import Reader, Sample, Source, is_single, sources_of

ERRORS = (BadFileError, OSError, ValueError, TypeError, FloatingPointError)  # about an input, not about the model


class Predictor:
    """Predicts images or clips: ``model('cat.jpg')``, ``model(['a.mp4', 'b.mp4'], batch_size=2)``.

    :func:`mmdyt.apis.load` makes one. All methods that change it return it. It is for one thread at a time.

    Attributes:
        host: The model, in evaluation mode.
        classes: Names of the classes; empty where nobody tells.
        palette: Their colours, red first; empty likewise.

    Args:
        host: A model of mmpretrain, mmseg or mmaction2 with a backbone of mmdyt.
        reader: Reads its inputs.
        classes: As above.
        palette: As above.
    """

    def __init__(
        self, host: nn.Module, reader: Reader, classes: Sequence[str] = (), palette: Sequence[Sequence[int]] = ()
    ):
        self.host = host.eval()
        self.classes, self.palette = tuple(classes), list(palette)
        self._reader = reader
        self._rates = RateControl(host)
        self._gmacs: float | None = None
        self._watch()
        self._collector = Collector(host, self.classes, self.palette)

    def _watch(self) -> None:
        """Count costs and record decisions from here on."""
        self._counter, self._recorder = CostCounter(self.host), MapRecorder(self.host)

    @property
    def video(self) -> bool:
        """Whether inputs are clips."""
        return self._reader.video

    @property
    def equal_shares(self) -> bool:
        """Whether a rate that is set is that of every layer, since the checkpoint has no capacities."""
        return self._rates.equal

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.host.parameters()).device

    def to(self, device: str | torch.device) -> 'Predictor':
        """Move the model to a device."""
        self.host.to(device)
        return self

    def set_rate(self, rate: float | None) -> 'Predictor':
        """Run this share of the patch tokens, on every input; see :meth:`mmdyt.apis.rates.RateControl.shares`.

        Args:
            rate: Activation rate, in (0, 1]; 1 is the complete model. None is what the checkpoint says.

        Raises:
            ValueError: If it is out of range, or the model has no such dispatchers.
        """
        if rate is None:
            self._rates.reset()
        else:
            self._rates.check()
            self._rates.set_rate(rate)
        self._gmacs = None
        return self

    def set_gmacs(self, gmacs: float) -> 'Predictor':
        """Spend at most so much on every input, and as much of it as whole tokens allow.

        The rate follows from the size of the input, in closed form. The first input of each size runs twice.

        Args:
            gmacs: Neck and head included, all windows and views together; 10^9 multiply-adds.

        Raises:
            ValueError: If it is out of range, or the model has no dispatchers; for an input that cannot cost so little.
        """
        if not (is_number(gmacs) and gmacs > 0):
            raise ValueError(f'gmacs must be a positive number, got {gmacs!r}.')
        self._rates.check()
        self._gmacs = gmacs
        return self

    def __call__(
        self, inputs: Source | Sequence[Source], batch_size: int = 1, top: int = 5, pictures: bool = False
    ) -> Prediction | list[Prediction]:
        """Predict one input, or several.

        Args:
            inputs: A path or an array (:class:`mmdyt.apis.reading.Reader`); or a list of these, a folder, or a ``.txt``
                of paths, which give a list.
            batch_size: How many run at once, where they have one size.
            top: How many classes are wanted.
            pictures: Whether predictions keep what :mod:`mmdyt.apis.drawing` draws from.

        Raises:
            BadFileError: If a file is missing or broken; :meth:`each` goes on behind it.
            ValueError: If an input does not suit the model.
        """
        found = []
        for prediction in self.each(self.sources(inputs), batch_size, top, pictures):
            if isinstance(prediction, Skipped):
                raise prediction.error
            found.append(prediction)
        return found[0] if is_single(inputs) else found

    def sources(self, inputs: Source | Sequence[Source]) -> list[Source]:
        """The single files and arrays that ``inputs`` name; see :func:`mmdyt.apis.reading.sources_of`."""
        return sources_of(inputs, self.video)

    def each(
        self, sources: Iterable[Source], batch_size: int = 1, top: int = 5, pictures: bool = False
    ) -> Iterator[Prediction | Skipped]:
        """Predict one input after the other, in their order; what is broken is skipped.

        Args:
            sources: Files and arrays; they are read when their turn comes.
            batch_size: As of a call.
            top: As of a call.
            pictures: As of a call.

        Raises:
            ValueError: If an argument is out of range.
        """
        for name, value in dict(batch_size=batch_size, top=top).items():
            if not (is_integer(value) and value >= 1):
                raise ValueError(f'{name} must be at least 1, got {value!r}.')
        return self._each(sources, batch_size, top, pictures)

    def _each(self, sources: Iterable[Source], batch_size: int, top: int, pictures: bool):
        waiting: list[Sample] = []
        for i, source in enumerate(sources):
            name = f'input {i}' if isinstance(source, np.ndarray) else str(source)
            try:
                sample = self._reader.read(source, name)
            except ERRORS as error:
                yield from self._predict(waiting, top, pictures)
                waiting = []
                yield Skipped(name, error)
                continue
            if waiting and _size(waiting[0]) != _size(sample):
                yield from self._predict(waiting, top, pictures)
                waiting = []
            waiting.append(sample)
            if len(waiting) == batch_size:
                yield from self._predict(waiting, top, pictures)
                waiting = []
        yield from self._predict(waiting, top, pictures)

    def _predict(self, samples: list[Sample], top: int, pictures: bool) -> Iterator[Prediction | Skipped]:
        """Of one batch, inputs of one size."""
        if not samples:
            return
        if self._gmacs is not None:
            try:
                self._rates.set_gmacs(self._gmacs, _size(samples[0]), lambda: self._run(copy.deepcopy(samples[:1])))
            except ValueError as error:
                yield from (Skipped(sample.name, error) for sample in samples)
                return
        try:
            with self._counter, self._recorder:  # in here: whoever iterates must not be watched
                outputs = self._run(samples)
                self._counter.add_images(len(samples), names=[sample.name for sample in samples])
                lines, maps = self._counter.take().lines(), self._recorder.take()
        except BaseException:
            self._watch()  # without half a batch, whatever goes on: a notebook does, after Ctrl-C
            raise
        drawn = [None] * len(samples)
        if pictures and maps:
            drawn = self._collector.describe(_collated(samples), outputs, lines, maps)
        for i, (sample, output, line) in enumerate(zip(samples, outputs, lines, strict=True)):
            found = maps[i] if maps else None
            try:
                prediction = self._prediction(output, line, top, found)
            except FloatingPointError as error:
                yield Skipped(sample.name, error)
                continue
            if pictures:
                prediction.pictures, prediction.dispatch = sample.pictures, drawn[i]
            yield prediction

    @torch.no_grad()
    def _run(self, samples: list[Sample]) -> list:
        return self.host.test_step(_collated(samples))

    def _prediction(self, output, line: dict, top: int, found: SampleMap | None) -> Prediction:
        """From what the host says of a sample, and what is known of its cost and its tokens.

        Raises:
            FloatingPointError: If that is not finite.
        """
        if line.get('broken'):
            raise FloatingPointError(f'logits of the dispatchers must be finite, got others in {line["broken"][0]}.')
        averages = getattr(self.host.cls_head, 'average_clips', 'prob') if is_recognizer(self.host) else 'prob'
        if getattr(getattr(self.host, 'cls_head', None), 'multi_class', False):
            averages = 'prob'  # each class on its own
        tokens = None if found is None else mean_map(found.activation().numpy())
        return Prediction(
            file=line['file'],
            top=scored(output, self.classes, top, averages),
            gmacs=line['gmacs'],
            gmacs_dense=line['gmacs_dense'],
            rate=line['activation_rate'],
            rates=line['rates'],
            segmentation=segmentation_of(output),
            tokens=tokens if tokens is None or self.video else tokens[0],
        )


def _collated(samples: list[Sample]) -> dict:
    return pseudo_collate([sample.packed for sample in samples])


def _size(sample: Sample) -> tuple:
    """What inputs of one batch have in common."""
    return tuple(sample.packed['inputs'].shape)
