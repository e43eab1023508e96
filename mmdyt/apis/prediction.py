"""What a model says of one input, and what that cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from mmengine.structures import BaseDataElement

from mmdyt.engine.visualize.sample import SampleDispatch

DIGITS = 6  # of rates and scores in JSON


class Scored(NamedTuple):
    """A class and its score: a probability; for segmentation the share of the image's area."""

    name: str
    label: int
    score: float


@dataclass
class Prediction:
    """What a model says of one image or clip.

    Attributes:
        file: Its path, or for an array its place among the inputs, ``'input 0'``.
        top: The best classes, the best first; of a segmentation the largest.
        gmacs: What it cost, all windows and views together; 10^9 multiply-adds.
        gmacs_dense: The same of the plain ViT.
        rate: Mean over the branches of their activation rates; None where nothing is skipped.
        rates: Activation rate of each branch.
        segmentation: (H, W), the class of each pixel of the image; None for other tasks.
        tokens: (H', W') for an image, (T, H', W') for a clip: share of the branches that ran, of each patch; NaN where
            nothing was seen. None where nothing is skipped.
        pictures: The image, or the frames of a clip's first view, (H, W, 3), blue first; None unless pictures are
            asked for.
        dispatch: All that is known of the tokens; None likewise.
    """

    file: str
    top: list[Scored]
    gmacs: float
    gmacs_dense: float
    rate: float | None
    rates: dict[str, float]
    segmentation: np.ndarray | None = None
    tokens: np.ndarray | None = None
    pictures: Sequence[np.ndarray] | None = None
    dispatch: SampleDispatch | None = None

    @property
    def label(self) -> str:
        """Name of the best class."""
        return self.top[0].name

    @property
    def score(self) -> float:
        """Of the best class."""
        return self.top[0].score

    def line(self) -> dict:
        """As plain values, for JSON."""
        top = [dict(name=name, label=label, score=_rounded(score)) for name, label, score in self.top]
        costs = dict(gmacs=self.gmacs, gmacs_dense=self.gmacs_dense)
        rates = {name: _rounded(rate) for name, rate in self.rates.items()}
        return dict(file=self.file, top=top, **costs, activation_rate=_rounded(self.rate), rates=rates)

    def __str__(self) -> str:
        """In one line, for people."""
        words = ', '.join(f'{name} {score:.3f}' for name, _, score in self.top)
        rate = '' if self.rate is None else f', rate {self.rate:.3f}'
        return f'{self.file}: {words} ({self.gmacs:.4g} of {self.gmacs_dense:.4g} GMACs{rate})'


@dataclass
class Skipped:
    """An input that could not be predicted.

    Attributes:
        file: As of :class:`Prediction`.
        error: What is wrong with it.
    """

    file: str
    error: Exception

    def line(self) -> dict:
        """As plain values, for JSON."""
        return dict(file=self.file, error=str(self.error))

    def __str__(self) -> str:
        """In one line, for people."""
        return f'{self.file}: skipped. {" ".join(str(self.error).split())}'


def scored(output: BaseDataElement, classes: Sequence[str], number: int, averages: str | None) -> list[Scored]:
    """The best classes of what a host predicted.

    Args:
        output: Of one sample.
        classes: Names, as far as they are known.
        number: How many are wanted.
        averages: How a head of mmaction2 averages views (``average_clips``); ``'score'`` and None leave scores that are
            no probabilities. ``'prob'`` where scores are.

    Raises:
        FloatingPointError: If a score is not finite.
    """
    if 'pred_sem_seg' in output:
        labels, counts = output.pred_sem_seg.data.unique(return_counts=True)
        shares = counts.double() / counts.sum()
        order = shares.argsort(descending=True, stable=True)[:number]
        return [_named(classes, int(labels[i]), float(shares[i])) for i in order]
    scores = output.pred_score.detach().double().cpu()
    if averages != 'prob':
        scores = scores.softmax(-1)
    scores = scores.reshape(-1, scores.shape[-1]).mean(0)  # over views that nobody has averaged
    if not scores.isfinite().all():
        raise FloatingPointError('prediction must be of numbers, got NaN or infinity.')
    best = scores.topk(min(number, len(scores)))
    return [_named(classes, int(i), float(score)) for score, i in zip(*best, strict=True)]


def segmentation_of(output: BaseDataElement) -> np.ndarray | None:
    """(H, W), the class of each pixel; None where the host says nothing of pixels."""
    if 'pred_sem_seg' not in output:
        return None
    logits = output.get('seg_logits')
    if logits is not None and logits.data.isnan().any():
        raise FloatingPointError('prediction must be of numbers, got NaN.')
    return output.pred_sem_seg.data[0].to(torch.int64).cpu().numpy()


def _named(classes: Sequence[str], label: int, score: float) -> Scored:
    return Scored(classes[label] if label < len(classes) else f'class {label}', label, score)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)
