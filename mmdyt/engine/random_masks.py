"""Measure what the dispatchers know: the same test with masks that chance drew, at the same activation rates."""

import torch
from mmengine.evaluator import DumpResults, Evaluator
from mmengine.hooks import Hook
from mmengine.runner import TestLoop, ValLoop
from mmengine.runner.amp import autocast

from mmdyt.core.observe import dynamic_branches, random_masks, unrecorded
from mmdyt.engine.costs import LAYER_RATE
from mmdyt.engine.flops import FLOPsHook
from mmdyt.engine.host import branch_labels, find_host
from mmdyt.registry import HOOKS

from .calibration import seeded, unwrapped


@HOOKS.register_module()
class RandomMasksHook(Hook):
    """After a test or validation, repeat it with random masks at the activation rates that were measured in it.

    Each branch keeps its own rate, so the difference of the metrics is what the choice of *tokens* is worth, not that
    of layers. Adds the metrics of the second pass as ``random_masks/<name>``; it takes as long as the first. The masks
    are always the same ones. Wants :class:`~mmdyt.engine.flops.FLOPsHook` before it, which measures the rates.
    Source: Dynamic Tuning (arXiv 2403.11808), table 7, which trains with such masks; here they replace trained ones.

    Raises:
        ValueError: If the model has no dispatchers, or nothing measured their rates.
    """

    def before_run(self, runner) -> None:
        """Refuse a model without dispatchers, and a run that does not measure their rates."""
        if not dynamic_branches(runner.model):
            raise ValueError('model must have dispatchers for mmdyt.RandomMasksHook, got none.')
        if not any(isinstance(hook, FLOPsHook) for hook in runner.hooks[: runner.hooks.index(self)]):
            raise ValueError('custom_hooks must hold mmdyt.FLOPsHook before mmdyt.RandomMasksHook, got none.')

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        """Repeat the validation."""
        self._repeat(runner, runner.val_loop, metrics, 'val')

    def after_test_epoch(self, runner, metrics: dict | None = None) -> None:
        """Repeat the test."""
        self._repeat(runner, runner.test_loop, metrics, 'test')

    def _repeat(self, runner, loop: ValLoop | TestLoop, metrics: dict, mode: str) -> None:
        backbone = find_host(runner.model).backbone
        names = branch_labels(list(dynamic_branches(backbone)))
        rates = {name: metrics.get(f'{LAYER_RATE}{label}') for name, label in names.items()}
        rates = {name: rate for name, rate in rates.items() if rate is not None}
        if not rates:
            runner.logger.warning('No second pass with random masks: no rate was measured.')
            return
        again = Evaluator([metric for metric in loop.evaluator.metrics if not isinstance(metric, DumpResults)])
        again.dataset_meta = loop.evaluator.dataset_meta
        model = unwrapped(runner.model)
        with unrecorded(), seeded(), torch.no_grad(), random_masks(backbone, rates), autocast(enabled=loop.fp16):
            for batch in loop.dataloader:
                again.process(data_samples=model.test_step(batch), data_batch=batch)
            found = again.evaluate(len(loop.dataloader.dataset))
        pairs = ', '.join(f'{name} {value:.4g} (dispatchers {metrics[name]:.4g})' for name, value in found.items())
        runner.logger.info(f'Random masks at the same rates: {pairs}.')
        for name, value in found.items():
            runner.message_hub.update_scalar(f'{mode}/random_masks/{name}', value)
            metrics[f'random_masks/{name}'] = value
