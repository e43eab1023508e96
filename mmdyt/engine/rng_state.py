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

    Validation leaves the generators as it found them: it draws too (loader seeds, a random pipeline), and a checkpoint
    of the same step is written before it.

    The checkpoint is rank 0's. The other ranks of a distributed run are re-seeded from it and their rank: still
    independent of each other, but not a repetition of the unbroken run.
    """

    def __init__(self):
        self._states: dict | None = None
        self._before_val: dict | None = None

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Add ``rng_state`` to the checkpoint."""
        checkpoint['rng_state'] = get_random_states()

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Remember the states; they are put back when training starts, and only when it resumes."""
        self._states = checkpoint.get('rng_state')

    def before_val(self, runner) -> None:
        """Remember the states, for afterwards."""
        self._before_val = get_random_states()

    def after_val(self, runner) -> None:
        """Go on as if there had been no validation."""
        set_random_states(self._before_val)

    def before_train_epoch(self, runner) -> None:
        """Epoch-based loops: restore everything before the data loader starts its workers."""
        if not isinstance(runner.train_loop, IterBasedTrainLoop):
            self._restore(runner, data=True)

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Iteration-based loops: restore once the data has been replayed."""
        self._restore(runner, data=False)

    def _restore(self, runner, data: bool) -> None:
        """Put the remembered states back, once."""
        states, self._states = self._states, None
        if states is None or runner.iter == 0:
            return
        if get_rank() > 0:
            torch.manual_seed(int(states['torch'][:4].sum()) + runner.iter * 1000 + get_rank())
            return
        set_random_states(states, data=data)


def get_random_states() -> dict:
    """States of all generators, as types that ``torch.load`` accepts with its safety on."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return dict(
        python=random.getstate(),
        numpy=(kind, keys.tolist(), position, has_gauss, gauss),
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    )


def set_random_states(states: dict, *, data: bool = True) -> None:
    """Put back what :func:`get_random_states` returned.

    Args:
        states: On any device: a runner on a GPU maps all tensors of a checkpoint there, but these live on the CPU.
        data: Include the generators that data pipelines draw from, Python's and NumPy's.
    """
    torch.set_rng_state(states['torch'].cpu())
    if states['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states['cuda'].cpu())
    if data:
        random.setstate(states['python'])
        np.random.set_state(states['numpy'])
