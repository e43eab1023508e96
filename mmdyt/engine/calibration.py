"""Calibrate the dispatchers of a host model on training images: at the end of training, or of a checkpoint."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn as nn
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import IterBasedTrainLoop
from torch.utils.data import DataLoader

from mmdyt.core.fit.calibrate import Calibrated, Forwards, calibrate, check_per_image, set_threshold, token_dispatchers
from mmdyt.core.fit.request import CalibrationRequest
from mmdyt.core.fit.restore import unless_refused
from mmdyt.core.observe import eval_mode
from mmdyt.engine.costs import CostCounter
from mmdyt.engine.finite import UnfinishedError
from mmdyt.engine.rng_state import get_random_states, set_random_states
from mmdyt.engine.sharding import gathered
from mmdyt.registry import HOOKS

LEAST_RATE = 1e-9
COST_TOLERANCE = 5e-3
COST_STEPS = 10  # of the search for a cost


def wanted_rate(host: nn.Module, target_rate: float | None) -> float:
    """The rate to calibrate to: ``target_rate``, or where this is None that of the model's rate loss.

    Raises:
        ValueError: If there is neither.
    """
    rate = getattr(host, 'target_rate', None) if target_rate is None else target_rate
    if rate is None:
        raise ValueError(f'target_rate must be given, since the {type(host).__name__} has none, got None.')
    return rate


@torch.no_grad()
def calibrate_host(
    host: nn.Module, train: DataLoader, val: DataLoader | None, request: CalibrationRequest
) -> dict[str, Calibrated]:
    """Calibrate a host model on training images that run as in a test, always the same ones.

    The images are a fixed random choice of the training set, since lists are often sorted by class. They take the
    pipeline of validation and the host's whole test step: augmented images, or whole ones where the test has windows or
    views, open other tokens. The random numbers of the process go on afterwards as if nothing had been.

    Args:
        host: A model of mmpretrain, mmseg or mmaction2, without a wrapper.
        train: Whose images are used, the request's number of batches times its batch size.
        val: Whose pipeline, batch size, collation and number of workers are used. Without one, or where a wrapped data
            set has no pipeline of its own, those of training are.
        request: What is wanted: a rate, by default that of the model's rate loss, or a cost, for which the rate is
            searched that gives it to 0.5 %.

    Returns:
        As of :func:`mmdyt.core.fit.calibrate.calibrate`.

    Raises:
        ValueError: If no rate gives ``target_gmacs`` to 0.5 %; thresholds and capacities are then as before.
    """
    with seeded():
        batches = [part for batch in some_batches(train, val, request.num_batches) for part in _equal_sizes(batch)]
        forwards = [partial(host.test_step, batch) for batch in batches]
        if request.target_gmacs is not None:
            with unless_refused(host):
                return _calibrate_cost(host, forwards, request)
        return calibrate(host, forwards, replace(request, target_rate=wanted_rate(host, request.target_rate)))


def _calibrate_cost(host: nn.Module, forwards: Forwards, request: CalibrationRequest) -> dict[str, Calibrated]:
    """Calibrate to a cost: false position on the rate, which is exact at once where the cost is linear in it."""
    target_gmacs = request.target_gmacs

    def calibrate_to(rate: float) -> tuple[dict[str, Calibrated], float]:
        found = calibrate(host, forwards, replace(request, target_gmacs=None, target_rate=rate))
        with CostCounter(host) as counter, eval_mode(host):
            for forward in forwards:
                counter.add_images(len(forward()))
        return found, counter.report()['gmacs']

    low, high = (0.0, calibrate_to(LEAST_RATE)[1]), (1.0, calibrate_to(1.0)[1])
    if not low[1] <= target_gmacs <= high[1]:
        raise ValueError(
            f'target_gmacs must lie between {low[1]:.3f}, where no patch token is active, and {high[1]:.3f}, where all '
            f'are, got {target_gmacs}.'
        )
    for _ in range(COST_STEPS):
        share = (target_gmacs - low[1]) / max(high[1] - low[1], 1e-12)
        rate = min(max(low[0] + share * (high[0] - low[0]), LEAST_RATE), 1.0)
        found, gmacs = calibrate_to(rate)
        if abs(gmacs / target_gmacs - 1) <= COST_TOLERANCE:
            print_log(f'Cost of the calibration images: {gmacs:.3f} GMACs (target {target_gmacs:.3f}).', 'current')
            return found
        low, high = ((rate, gmacs), high) if gmacs < target_gmacs else (low, (rate, gmacs))
    raise ValueError(f'target_gmacs must be a cost that a few batches can tell, got {target_gmacs}. Take more batches.')


def some_batches(train: DataLoader, val: DataLoader | None, num_batches: int) -> list[dict]:
    """Batches of a fixed random choice of images; samplers and workers of the run are left alone."""
    dataset, like = train.dataset, train
    if val is not None and hasattr(dataset, 'pipeline') and hasattr(val.dataset, 'pipeline'):
        dataset, like = copy.copy(dataset), val
        dataset.pipeline = val.dataset.pipeline
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    loader = DataLoader(
        dataset,
        like.batch_sampler.batch_size,
        sampler=order[: num_batches * train.batch_sampler.batch_size].tolist(),
        num_workers=like.num_workers,
        collate_fn=like.collate_fn,
    )
    batches = list(loader)
    if not isinstance(batches[0], dict):
        raise ValueError(
            f'train_dataloader.dataset must give one sample at a time, got a {type(dataset).__name__}, whose batches '
            f'are of type {type(batches[0]).__name__}.'
        )
    return batches


def _equal_sizes(batch: dict) -> list[dict]:
    """Parts of a batch whose images have the same size: tests do not pad, but crops of small images are smaller."""
    sizes = [tuple(image.shape) for image in batch['inputs']]
    if len(set(sizes)) == 1:
        return [batch]
    groups = [[i for i, other in enumerate(sizes) if other == size] for size in dict.fromkeys(sizes)]
    return [{key: [values[i] for i in group] for key, values in batch.items()} for group in groups]


@contextmanager
def seeded() -> Iterator[None]:
    """Within the context random numbers start anew, always alike; afterwards they go on as before."""
    states = get_random_states()
    try:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        yield
    finally:
        set_random_states(states)


@HOOKS.register_module()
class CalibrationHook(Hook):
    """Set the thresholds of the dispatchers at the end of training, such that inference meets the target rate.

    Runs after the last step and before its checkpoint is saved and validated, in epoch- and iteration-based loops, on
    training images in the pipeline of validation; see :func:`calibrate_host`. Earlier checkpoints and validations have
    the thresholds of training: the paper's 0, also in a run that goes on from a calibrated checkpoint. In distributed
    training the first process calibrates and sends the others what it set. Where it fails, or training stops early, the
    run ends with an error once all else is done and saved.  # differs from paper: opt-in.

    Args:
        rule: How the rate is divided among the branches, ``'rate_matched'``, ``'uniform'`` or ``'global'``; see
            :func:`mmdyt.core.fit.calibrate.calibrate`.
        target_rate: Wanted activation rate, in (0, 1]; None is that of the model's rate loss.
        num_batches: How many batches of training images decide, >= 1. They stay in memory meanwhile.
        per_image: Give every image the same rate, so that images which look different from these meet it too.

    Raises:
        ValueError: If an argument is out of range, or, before training, if the model has no thresholds or no target
            rate, no training image can be read, or the weights that will be tested are not those that are trained
            (``EMAHook``).
    """

    priority = 'LOW'  # after whatever changes the model, before CheckpointHook

    def __init__(
        self,
        rule: str = 'rate_matched',
        target_rate: float | None = None,
        num_batches: int = 8,
        per_image: bool = False,
    ):
        self.request = CalibrationRequest(target_rate, rule, per_image, num_batches)
        self._failure = ''

    def before_train(self, runner) -> None:
        """Refuse what cannot be calibrated, images included."""
        if any(isinstance(hook, EMAHook) for hook in runner.hooks):
            raise ValueError(
                'custom_hooks must hold mmdyt.CalibrationHook or EMAHook, got both. Calibrate the averaged checkpoint '
                'with tools/calibrate.py.'
            )
        host = unwrapped(runner.model)
        wanted_rate(host, self.request.target_rate)
        check_per_image(token_dispatchers(host), self.request.per_image)
        sampling = {name: d for name, d in token_dispatchers(host).items() if d.noise}
        set_threshold(sampling, 0.0)  # an earlier calibration belongs to scores that training will change
        with seeded():
            some_batches(runner.train_dataloader, _val_dataloader(runner), 1)  # better now than after the last step

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Calibrate after the last iteration."""
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            last = self.is_last_train_iter(runner)
        else:
            last = self.is_last_train_epoch(runner) and self.end_of_epoch(runner.train_dataloader, batch_idx)
        if last:
            self._calibrate(runner)

    def after_train(self, runner) -> None:
        """Say so where training was stopped before its last iteration."""
        if _unfinished(runner):
            runner.logger.warning('Training stopped early, without calibration. Calibrate with tools/calibrate.py.')
            self._failure = 'training that stopped early'

    def after_run(self, runner) -> None:
        """End with an error where there is no calibration, once everything is saved."""
        failure, self._failure = self._failure, ''
        if failure:
            raise UnfinishedError(
                f'calibration must succeed, got {failure}. The checkpoint is whole, but not calibrated: do it with '
                'tools/calibrate.py.'
            )

    def _calibrate(self, runner) -> None:
        """Set the same thresholds in all processes, and log what they give; whatever goes wrong, training is kept."""
        host = unwrapped(runner.model)
        rate = wanted_rate(host, self.request.target_rate)
        dispatchers = list(token_dispatchers(host).values())
        decisions = [(dispatcher.threshold.item(), dispatcher.capacity) for dispatcher in dispatchers]
        with gathered(runner.model):
            if is_main_process():
                val = _val_dataloader(runner)
                try:
                    found = calibrate_host(host, runner.train_dataloader, val, self.request)
                    decisions = [(dispatcher.threshold.item(), dispatcher.capacity) for dispatcher in dispatchers]
                    runner.logger.info(f'Calibrated thresholds ({self.request.rule}): {sentence(found, rate)}')
                except Exception as error:  # the weights are not saved yet
                    self._failure = f'{type(error).__name__}: {error}'
                    runner.logger.error(
                        f'Calibration failed ({type(error).__name__}: {error}). The checkpoint is not calibrated: do '
                        'it with tools/calibrate.py.'
                    )
            told = [decisions, self._failure]
            broadcast_object_list(told)
        decisions, self._failure = told
        for dispatcher, (threshold, capacity) in zip(dispatchers, decisions, strict=True):
            dispatcher.set_rule(threshold, capacity)


def unwrapped(model: nn.Module) -> nn.Module:
    """The host model, out of the wrapper of distributed training."""
    return model.module if is_model_wrapper(model) else model


def _val_dataloader(runner) -> DataLoader | None:
    """The validation's, where there is one."""
    return None if runner.val_loop is None else runner.val_loop.dataloader


def _unfinished(runner) -> bool:
    """Whether there is training left to do."""
    loop = runner.train_loop
    return loop.iter < loop.max_iters if isinstance(loop, IterBasedTrainLoop) else loop.epoch < loop.max_epochs


def sentence(found: dict[str, Calibrated], target_rate: float | None) -> str:
    """The achieved activation rate beside the wanted one, and those of the branches in network order."""
    rates = [branch.rate for branch in found.values()]
    branches = ' '.join(f'{rate:.2f}' for rate in rates)
    wanted = '' if target_rate is None else f' (target {target_rate:.2f})'
    return f'activation rate {sum(rates) / len(rates):.3f}{wanted}, by layer {branches}.'
