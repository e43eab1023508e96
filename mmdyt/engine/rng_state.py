"""Resume the random numbers too, so that a resumed run repeats the unbroken one."""

import random

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop

from mmdyt.registry import HOOKS


@HOOKS.register_module()
class RNGStateHook(Hook):
    """Keep the state of the random number generators in every checkpoint and restore it on resuming.

    mmengine replays the data order, but dispatch noise, dropout and drop path draw anew after a resume. An
    iteration-based loop replays the data itself, so only torch's generators are restored, before its first step; an
    epoch-based loop restores all of them at the start of its epoch.

    The checkpoint is rank 0's. The other ranks of a distributed run are re-seeded from it and their rank: still
    independent of each other, but not a repetition of the unbroken run.
    """

    def __init__(self):
        self._state: dict | None = None

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Add ``rng_state`` to the checkpoint, as types that ``torch.load`` accepts with its safety on."""
        kind, keys, position, has_gauss, gauss = np.random.get_state()
        checkpoint['rng_state'] = dict(
            python=random.getstate(),
            numpy=(kind, keys.tolist(), position, has_gauss, gauss),
            torch=torch.get_rng_state(),
            cuda=torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        )

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Remember the state; it is put back when training starts, and only when it resumes."""
        self._state = checkpoint.get('rng_state')

    def before_train_epoch(self, runner) -> None:
        """Epoch-based loops: restore everything before the data loader starts its workers."""
        if not isinstance(runner.train_loop, IterBasedTrainLoop):
            self._restore(runner, data=True)

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Iteration-based loops: restore once the data has been replayed."""
        self._restore(runner, data=False)

    def _restore(self, runner, data: bool) -> None:
        """Put the remembered state back, once."""
        state, self._state = self._state, None
        if state is None or runner.iter == 0:
            return
        # on a GPU the runner maps all tensors of a checkpoint there, but these states live on the CPU
        torch_state = state['torch'].cpu()
        if get_rank() > 0:
            torch.manual_seed(int(torch_state[:4].sum()) + runner.iter * 1000 + get_rank())
            return
        torch.set_rng_state(torch_state)
        if state['cuda'] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state['cuda'].cpu())
        if data:
            random.setstate(state['python'])
            np.random.set_state(state['numpy'])
