"""Training in stages: all tokens, then fewer, then as few as are wanted."""

from collections.abc import Mapping

import torch
import torch.nn as nn
from mmengine.hooks import Hook

from mmdyt.core.fit.request import check_batches
from mmdyt.core.options import is_number
from mmdyt.core.teacher import FeatureTeacher

from .calibration import unwrapped


def scheduled_rate(progress: float, begin: float, end: float, target_rate: float) -> float:
    """Share of tokens at a training progress in [0, 1]: 1 up to ``begin``, linear, and the target from ``end``."""
    if progress >= end:
        return target_rate
    if progress <= begin:
        return 1.0
    return 1 - (1 - target_rate) * (progress - begin) / (end - begin)


class StagedHook(Hook):
    """A hook that trains with all tokens up to ``begin``, and in stage 2, up to ``end``, with fewer and fewer.

    The model of the end of stage 1 may teach the rest of training; it is kept in checkpoints.

    Args:
        begin: Where stage 1 ends, as a fraction of training, in [0, 1); at the earliest after the first step.
        end: Where stage 2 ends, in [begin, 1].
        num_batches: Batches of training images that gates are fitted on, >= 1. They stay in memory meanwhile.
        feature_weight: >= 0, of :class:`mmdyt.core.teacher.FeatureTeacher`; 0 is no teacher.
        inactive_weight: >= 0, of the teacher.

    Raises:
        ValueError: If an argument is out of range.
    """

    priority = 'LOW'  # after whatever changes the model, before CheckpointHook

    def __init__(self, begin: float, end: float, num_batches: int, feature_weight: float, inactive_weight: float = 0.0):
        if not (is_number(begin) and 0 <= begin < 1):
            raise ValueError(f'begin must lie in [0, 1), got {begin!r}.')
        if not (is_number(end) and begin <= end <= 1):
            raise ValueError(f'end must lie in [begin, 1] = [{begin}, 1], got {end!r}.')
        check_batches(num_batches)
        if not (is_number(feature_weight) and feature_weight >= 0):
            raise ValueError(f'feature_weight must be at least 0, got {feature_weight!r}.')
        self.begin, self.end, self.num_batches = begin, end, num_batches
        self.feature_weight, self.inactive_weight = feature_weight, inactive_weight
        self._saved: dict[str, torch.Tensor] | None = None  # the teacher of the checkpoint that is resumed

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Remember the teacher of a run that goes on; weights that a new run begins with bring none."""
        self._saved = checkpoint.get('teacher') if runner._resume else None

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Add the teacher, which a resumed run needs."""
        teacher = getattr(unwrapped(runner.model), 'teacher', None)
        if teacher is not None:
            checkpoint['teacher'] = teacher.tensors

    def first(self, runner) -> int:
        """The iteration in which stage 2 begins: not before the first step of the optimizer.

        Heads of mmpretrain start at zero, and behind such a head no token has evidence.
        """
        step = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
        return min(max(round(self.begin * runner.max_iters), step), runner.max_iters - 1)

    def begin_teaching(self, host: nn.Module) -> None:
        """From now on the host as it is teaches, where that is wanted."""
        if self.feature_weight:
            self._teach(host, None)

    def go_on_teaching(self, host: nn.Module) -> None:
        """The teacher of the checkpoint teaches, where that is wanted.

        Raises:
            ValueError: If there is none in it.
        """
        if not self.feature_weight:
            return
        if self._saved is None:
            raise ValueError(f'feature_weight must be 0 for a checkpoint without a teacher, got {self.feature_weight}.')
        self._teach(host, self._saved)

    def _teach(self, host: nn.Module, tensors: Mapping[str, torch.Tensor] | None) -> None:
        host.set_teacher(FeatureTeacher(host.backbone, self.feature_weight, tensors, self.inactive_weight))


def save_as_it_is(runner) -> None:
    """Keep what was trained before a fit that failed."""
    done = dict(epoch=runner.epoch, iter=runner.iter)
    runner.save_checkpoint(runner.work_dir, 'before_fit.pth', meta=done, by_epoch=False)
    runner.logger.error(f'Fitting failed after {runner.iter} iterations. They are saved in before_fit.pth.')
