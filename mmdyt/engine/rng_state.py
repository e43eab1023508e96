"""Resume the random numbers too, so that a resumed run repeats the unbroken one."""

import random
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from torch.utils.data import get_worker_info

from mmdyt.registry import HOOKS


@HOOKS.register_module()
class RNGStateHook(Hook):
    """Keep the state of the random number generators in every checkpoint and restore it on resuming.

    mmengine replays the data order, but dispatch noise, dropout and drop path draw anew after a resume. All generators
    are restored just before the first batch that has not been trained on is read: an iteration-based loop reads the
    earlier ones first, and so does an epoch-based one that stopped within an epoch, which mmengine would repeat whole.

    What workers of an epoch-based loop draw follows from seed, epoch and worker (:class:`EpochSeeds`): they may live
    through all epochs, and nobody knows their states.

    Validation leaves the generators as it found them: it draws too (loader seeds, a random pipeline), and a checkpoint
    of the same step is written before it.

    The checkpoint is rank 0's. The other ranks of a distributed run are re-seeded from it and their rank: still
    independent of each other, but not a repetition of the unbroken run.
    """

    def __init__(self):
        self._states: dict | None = None
        self._before_val: dict | None = None
        self._trained: list[int] | None = None  # batches of the epoch that is resumed, of how many
        self._epoch = (-1, 0)  # that runs, and its first iteration
        self._seeds: EpochSeeds | None = None

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Add ``rng_state``, and within an epoch ``trained_batches``."""
        checkpoint['rng_state'] = self._before_val or get_random_states()
        epoch, first = self._epoch
        if isinstance(runner.train_loop, EpochBasedTrainLoop) and checkpoint['meta']['epoch'] == epoch:
            checkpoint['trained_batches'] = [checkpoint['meta']['iter'] - first, len(runner.train_dataloader)]

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Remember the states; they are put back when training starts, and only when it resumes."""
        self._states = checkpoint.get('rng_state')
        self._trained = checkpoint.get('trained_batches')

    def before_val(self, runner) -> None:
        """Remember the states, for afterwards."""
        self._before_val = get_random_states()

    def after_val(self, runner) -> None:
        """Go on as if there had been no validation."""
        set_random_states(self._before_val)
        self._before_val = None

    def before_train(self, runner) -> None:
        """Let workers draw anew in each epoch."""
        loader = runner.train_dataloader
        if isinstance(runner.train_loop, EpochBasedTrainLoop) and getattr(loader, 'num_workers', 0):
            loader.worker_init_fn = self._seeds = EpochSeeds(loader.worker_init_fn, runner.seed, get_rank())

    def before_train_epoch(self, runner) -> None:
        """Restore everything, now or once the batches are read that have been trained on."""
        loop, resumes = runner.train_loop, self._states is not None and runner.iter > 0
        if isinstance(loop, IterBasedTrainLoop):
            if resumes:
                loop.dataloader_iterator = _then(loop.dataloader_iterator, runner.iter, partial(self._restore, runner))
            return
        loader, trained = runner.train_dataloader, self._trained if resumes else None
        skipped = trained[0] if trained and trained[1] == len(loader) else 0
        self._epoch, self._trained = (runner.epoch, runner.iter - skipped), None
        if self._seeds is not None:
            self._seeds.start(runner.epoch)
        if resumes and getattr(loader, 'persistent_workers', False):
            loader.generator = torch.Generator()  # the unbroken run has its workers, and draws no seed for new ones
        if skipped:
            _skip(loop, skipped, partial(self._restore, runner))
        else:
            self._restore(runner)

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Loops without epochs that are not mmengine's: restore in the first step."""
        if not isinstance(getattr(runner, 'train_loop', None), IterBasedTrainLoop | EpochBasedTrainLoop):
            self._restore(runner)

    def _restore(self, runner) -> None:
        """Put the remembered states back, once."""
        states, self._states = self._states, None
        if states is None or runner.iter == 0:
            return
        if get_rank() > 0:
            torch.manual_seed(int(states['torch'][:4].sum()) + runner.iter * 1000 + get_rank())
            return
        set_random_states(states)


class EpochSeeds:
    """Seeds the workers of a data loader by the epoch, the first one as ``init`` does.

    Args:
        init: The loader's own ``worker_init_fn``, or None.
        seed: Of the run.
        rank: Of the process.
    """

    def __init__(self, init: Callable[[int], None] | None, seed: int, rank: int):
        self._init, self._key = init, (seed, rank)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._seeded = 0

    def start(self, epoch: int) -> None:
        """Tell the workers that an epoch starts; they rest until its first batch is asked for."""
        self._epoch.fill_(epoch)

    def __call__(self, worker: int) -> None:
        """Run in each worker as it starts."""
        if self._init is not None:
            self._init(worker)
        dataset = get_worker_info().dataset
        fetch = getattr(dataset, '__getitems__', None) or (lambda indices: [dataset[index] for index in indices])

        def fetch_seeded(indices: list[int]) -> list:
            if (epoch := self._epoch.item()) != self._seeded:
                python, numpy, torch_seed = np.random.SeedSequence([*self._key, worker, epoch]).generate_state(3)
                random.seed(int(python))
                np.random.seed(numpy)
                torch.manual_seed(int(torch_seed))
                self._seeded = epoch
            return fetch(indices)

        dataset.__getitems__ = fetch_seeded  # what torch reads a batch with, if there is one


def _then(batches: Iterator, count: int, do: Callable[[], None]) -> Iterator:
    """The same batches, and ``do`` once ``count`` of them are read."""
    for _ in range(count):
        yield next(batches)
    do()
    yield from batches


def _skip(loop: EpochBasedTrainLoop, count: int, do: Callable[[], None]) -> None:
    """Let the epoch that starts read ``count`` batches without training on them, and then ``do``."""

    def read(idx: int, data_batch) -> None:
        if idx == count - 1:
            del loop.run_iter
            do()

    loop.run_iter = read  # of this loop: hooks are told the place of a batch in its epoch, so none can be left out


def get_random_states() -> dict:
    """States of all generators, as types that ``torch.load`` accepts with its safety on."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return dict(
        python=random.getstate(),
        numpy=(kind, keys.tolist(), position, has_gauss, gauss),
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    )


def set_random_states(states: dict) -> None:
    """Put back what :func:`get_random_states` returned.

    Args:
        states: On any device: a runner on a GPU maps all tensors of a checkpoint there, but these live on the CPU.
    """
    torch.set_rng_state(states['torch'].cpu())
    if states['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states['cuda'].cpu())
    random.setstate(states['python'])
    np.random.set_state(states['numpy'])
