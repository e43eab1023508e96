"""Pictures of dispatch after each validation and test."""

from contextlib import ExitStack
from pathlib import Path

from mmengine.dist import is_main_process

from mmdyt.core.observe import mapped_branches
from mmdyt.core.options import is_integer
from mmdyt.engine.evaluation import EvaluationHook
from mmdyt.engine.own_images import name_in_dataset, place_in_dataset, sampler_of, spread_places
from mmdyt.engine.visualize.collect import Collector
from mmdyt.engine.visualize.draw import draw, file_stem, rgb_sheet
from mmdyt.engine.visualize.sample import SampleDispatch
from mmdyt.registry import HOOKS


@HOOKS.register_module()
class DispatchVisualizationHook(EvaluationHook):
    """Draw which tokens ran where for some samples of each validation and test.

    Beside the log, in ``dispatch_val`` or ``dispatch_test``: a picture for each sample, charts over them, and
    ``index.html``, one page that needs no network. The visualisation back ends get the pictures, too.
    Samples are taken at equal distances from those of the first process; what the others test is not drawn.

    Args:
        number: How many samples at most, >= 1. Their maps and pictures stay in memory meanwhile.

    Raises:
        ValueError: If an argument is out of range, or, before work starts, if the model has no dispatchers.
    """

    def __init__(self, number: int = 32):
        if not (is_integer(number) and number >= 1):
            raise ValueError(f'number must be at least 1, got {number!r}.')
        self._number = number
        self._open = ExitStack()
        self._samples: list[SampleDispatch] = []

    def before_run(self, runner) -> None:
        """Refuse a model in which nothing is dispatched."""
        if not mapped_branches(runner.model):
            raise ValueError(
                'model must have dispatchers, or parts that make tokens fewer, for mmdyt.DispatchVisualizationHook, '
                'got none.'
            )

    def begin(self, runner, mode: str) -> None:
        """Start to gather."""
        self._open.close()  # a former evaluation may have been cut short
        self._samples, self._seen = [], 0
        loader = getattr(runner, f'{mode}_dataloader')
        place, name = place_in_dataset(loader), name_in_dataset(loader)
        self._due = spread_places(len(sampler_of(loader) or loader.dataset), self._number)
        if is_main_process():
            about = loader.dataset.metainfo
            collector = Collector(runner.model, about.get('classes'), about.get('palette'), lambda i: name(place(i)))
            self._collector = self._open.enter_context(collector)

    def see(self, runner, batch_idx: int, data_batch, outputs) -> None:
        """Gather the samples that are due."""
        if not is_main_process():
            return
        due = [i for i in range(len(outputs)) if self._seen + i in self._due]
        self._samples += self._collector.take(data_batch, outputs, due)
        self._seen += len(outputs)

    def finish(self, runner, metrics: dict | None, mode: str) -> None:
        """Draw."""
        self._open.close()
        if not (is_main_process() and self._samples):
            return
        folder = Path(runner.log_dir, f'dispatch_{mode}')
        page = draw(self._samples, folder, f'{runner.cfg.filename or runner.experiment_name}, {mode}')
        for i, sample in enumerate(self._samples):
            name = f'dispatch_{mode}_{i:04d}_{file_stem(sample.name)}'
            runner.visualizer.add_image(name, rgb_sheet(sample), step=runner.iter)
        self._samples = []
        runner.logger.info(f'Which tokens ran where: {page}.')
