"""Whether an exported model is the model: scores, accuracy and time beside it, on real images.

B images, K classes, H and W pixels.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner
from torch import Tensor

from mmdyt.core.dispatch import Dispatch
from mmdyt.core.observe import record_dispatch
from mmdyt.engine.benchmark.images import window
from mmdyt.engine.benchmark.measure import turns

TOLERANCE = 1e-4  # of the largest score of an image
TIE = 1e-5  # of the largest logit of an image: as far as fp32 is exact through a dozen layers
BATCHES = (1, 2, 5)  # images at once, in turns

Run = Callable[[Tensor], Tensor]


class TestImages:
    """Images of the config's test data as the model gets them, always the same random choice.

    Args:
        cfg: Its ``test_dataloader`` is used, without workers.
        host: The model; its data preprocessor is used.
        count: How many images at most.
        size: H and W that images are resized to; None is the size of the first one, or of the windows of a sliding
            test.

    Attributes:
        resized: How many images had another size.
    """

    __test__ = False  # pytest takes the name for a test

    def __init__(self, cfg: Config, host: nn.Module, count: int, size: tuple[int, int] | None = None):
        settings = dict(cfg.test_dataloader, num_workers=0, persistent_workers=False)
        settings.pop('prefetch_factor', None)
        loader = Runner.build_dataloader(settings)
        self.dataset, self._collate, self._preprocessor = loader.dataset, loader.collate_fn, host.data_preprocessor
        generator = torch.Generator().manual_seed(0)
        self._order = torch.randperm(len(self.dataset), generator=generator)[:count].tolist()
        self.size = tuple(size or window(host) or self._load(self._order[0])[0].shape[2:])
        self.resized = 0

    def __len__(self) -> int:
        return len(self._order)

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, where the data has some."""
        return list(self.dataset.metainfo.get('classes') or []) or None

    def batches(self, sizes: tuple[int, ...] = BATCHES) -> Iterator[tuple[Tensor, list]]:
        """Images (B, 3, H, W) and their data samples, in batches of these sizes in turns."""
        left, turn, self.resized = list(self._order), 0, 0
        while left:
            size = sizes[turn % len(sizes)]
            taken, left, turn = left[:size], left[size:], turn + 1
            images, samples = zip(*map(self._load_fitting, taken), strict=True)
            yield torch.cat(images), list(samples)

    def names(self) -> list[str]:
        """Paths of the images, or their places in the data set."""
        infos = [self.dataset.get_data_info(i) for i in self._order]
        return [info.get('img_path', f'image {i}') for i, info in zip(self._order, infos, strict=True)]

    def _load(self, index: int) -> tuple[Tensor, object]:
        data = self._preprocessor(self._collate([self.dataset[index]]), False)
        return data['inputs'], data['data_samples'][0]

    def _load_fitting(self, index: int) -> tuple[Tensor, object]:
        image, sample = self._load(index)
        if tuple(image.shape[2:]) != self.size:
            self.resized += 1
            image = F.interpolate(image, self.size, mode='bilinear', antialias=True)
        return image, sample


class Comparison:
    """How far scores are from those of the model, image by image.

    Attributes:
        differences: The largest one of each image, beside its largest score.
        tied: Whether which tokens of an image run hangs on a tie of scores, which rounding decides.
        equal: Predictions that are equal, of images or pixels.
        total: All predictions.
    """

    def __init__(self):
        self.differences: list[float] = []
        self.tied: list[bool] = []
        self.equal = self.total = 0

    def add(self, expected: Tensor, got: Tensor, tied: Tensor) -> None:
        """Compare a batch of scores, (B, K) or (B, K, H, W); ``tied`` (B,) is that of :func:`ties`."""
        scale = expected.flatten(1).abs().amax(1).clamp(min=torch.finfo(expected.dtype).tiny)
        self.differences += ((got - expected).flatten(1).abs().amax(1) / scale).tolist()
        self.tied += tied.tolist()
        same = predictions(expected) == predictions(got)
        self.equal, self.total = self.equal + int(same.sum()), self.total + same.numel()

    def unequal(self) -> list[int]:
        """Images whose scores differ by more than rounding can explain; what is no number is never explained."""
        pairs = enumerate(zip(self.differences, self.tied, strict=True))
        return [i for i, (d, tied) in pairs if not (d <= TOLERANCE or (tied and math.isfinite(d)))]

    def flipped(self) -> list[int]:
        """Images whose scores differ since rounding decided which tokens run."""
        pairs = enumerate(zip(self.differences, self.tied, strict=True))
        return [i for i, (d, tied) in pairs if tied and math.isfinite(d) and d > TOLERANCE]

    def largest(self) -> float:
        """The largest difference of the images in which the same tokens ran; 0 where there are none."""
        flipped = set(self.flipped())
        return max((d for i, d in enumerate(self.differences) if i not in flipped), default=0.0)


def predictions(scores: Tensor) -> Tensor:
    """The class of the highest score, (B,) or (B, H, W); of one class alone, whether it is positive."""
    return scores.argmax(1) if scores.shape[1] > 1 else scores[:, 0] > 0


def ties(dispatches: list[Dispatch]) -> Tensor:
    """Whether the last token that runs and the first that does not have equal scores up to rounding, (B,).

    Args:
        dispatches: Of one pass, all of equally many tokens of each image.
    """
    found = []
    for dispatch in dispatches:
        active = dispatch.active - dispatch.num_prefix_tokens
        logits = dispatch.logits.squeeze(-1)
        if 0 < active < logits.shape[1]:
            best = logits.sort(dim=1, descending=True).values
            found.append(best[:, active - 1] - best[:, active] <= TIE * logits.abs().amax(1))
    return torch.stack(found).any(0) if found else torch.zeros(1, dtype=torch.bool)


@torch.no_grad()
def compare(model: nn.Module, run: Run, images: TestImages) -> Comparison:
    """Compare what an exported model gives with what the model itself gives.

    Args:
        model: Normalised images to scores.
        run: The exported one.
        images: Real ones.
    """
    comparison = Comparison()
    for batch, _ in images.batches():
        with record_dispatch(model) as record:
            expected = model(batch)
        tied = ties([dispatch for dispatch in record.flat() if dispatch.active is not None])
        comparison.add(expected, run(batch), tied.expand(len(batch)))
    return comparison


@torch.no_grad()
def median_times(runs: Mapping[str, Run], images: Tensor, rounds: int) -> dict[str, float]:
    """Milliseconds of a pass, medians. All run once a round, each round begins with another one.

    Args:
        runs: What is timed, by name.
        images: (B, 3, H, W).
        rounds: Passes of each that count; one more warms up.
    """
    times, names = {name: [] for name in runs}, list(runs)
    for round_ in range(rounds + 1):
        for name in (names[i] for i in turns(len(names), round_)):
            start = time.perf_counter()
            runs[name](images)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(passes[1:]) for name, passes in times.items()}


@torch.no_grad()
def accuracies(host: nn.Module, runs: Mapping[str, Run], images: TestImages, cfg: Config) -> dict[str, dict]:
    """The metrics of the config's test on some images, by name of what ran.

    Args:
        host: Turns scores into predictions, as in any test.
        runs: What is tested.
        images: Real ones.
        cfg: Its ``test_evaluator`` is used.
    """
    evaluators = {name: Evaluator(copy.deepcopy(cfg.test_evaluator)) for name in runs}
    for evaluator in evaluators.values():
        evaluator.dataset_meta = images.dataset.metainfo
    for batch, samples in images.batches():
        for name, run in runs.items():
            evaluators[name].process(_predicted(host, run(batch), copy.deepcopy(samples)))
    found = {name: evaluator.evaluate(len(images)) for name, evaluator in evaluators.items()}
    return {name: {metric: float(value) for metric, value in metrics.items()} for name, metrics in found.items()}


def _predicted(host: nn.Module, scores: Tensor, samples: list) -> list:
    """Data samples with the host's predictions from scores."""
    if hasattr(host, 'postprocess_result'):  # mmseg
        return host.postprocess_result(scores, samples)
    return host.head._get_predictions(scores, samples)  # what predict() does with the scores
