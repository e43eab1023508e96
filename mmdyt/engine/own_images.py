"""Which images of a rank are its own: samplers repeat some until all ranks have equally many."""

import math
from collections.abc import Callable

from mmengine.dataset import DefaultSampler
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from mmdyt.engine.finite import file_of


def sampler_of(loader: DataLoader | None) -> Sampler | None:
    """What deals the samples of a loader out; None where nothing does."""
    return getattr(getattr(loader, 'batch_sampler', None), 'sampler', None)


def count_own(loader: DataLoader | None) -> float:
    """How many of the first samples of a loader are this rank's own; what follows repeats samples of other ranks.

    mmengine's samplers deal the samples out in turns and begin again where they end unevenly. Its metrics drop what
    they gather beyond the length of the data set, and so must all that is summed over ranks.

    Returns:
        Infinity where nothing is repeated.
    """
    sampler = sampler_of(loader)
    if not (isinstance(sampler, DefaultSampler) and sampler.round_up):
        return math.inf
    samples, rank, ranks = len(sampler.dataset), sampler.rank, sampler.world_size
    if getattr(sampler, 'subsample_type', None) == 'sequential':  # mmpretrain's, which deals out chunks
        return min(max(samples - rank * sampler.num_samples, 0), sampler.num_samples)
    return math.ceil((samples - rank) / ranks)


class OwnSamples:
    """Tells batch by batch which of their samples are this rank's own.

    Args:
        loader: As of :func:`count_own`.
    """

    def __init__(self, loader: DataLoader | None):
        self._left = count_own(loader)

    def of(self, number: int) -> int:
        """How many of the next ``number`` samples are, the first ones."""
        own = int(min(number, self._left))
        self._left -= own
        return own


def place_in_dataset(loader: DataLoader | None) -> Callable[[int], int]:
    """Where in the data set the i-th sample of this rank stands; without a sampler that tells, i itself."""
    sampler = sampler_of(loader)
    if not isinstance(sampler, DefaultSampler):
        return int
    if getattr(sampler, 'subsample_type', None) == 'sequential':
        return lambda i: sampler.rank * sampler.num_samples + i
    return lambda i: sampler.rank + i * sampler.world_size


def name_in_dataset(loader: DataLoader | None) -> Callable[[int], str]:
    """The file of the sample at a place of the data set, or the place where none is known."""
    dataset = getattr(loader, 'dataset', None)
    shuffled = getattr(sampler_of(loader), 'shuffle', False)

    def name(place: int) -> str:
        known = hasattr(dataset, 'get_data_info') and place < len(dataset) and not shuffled
        return (file_of(dataset.get_data_info(place)) if known else None) or f'sample {place}'

    return name


def spread_places(samples: int, number: int) -> list[int]:
    """Places of at most ``number`` of some samples, at equal distances."""
    return sorted({i * samples // number for i in range(number)})


def of_each(counts: Tensor, number: int) -> Tensor:
    """Sum of what was counted for each of a number of samples, which all take equally many rows in turn.

    Where they do not, nobody knows whose a row is: then all samples have the same share.

    Args:
        counts: (K, rows), K counts.
        number: Samples that the rows belong to.

    Shape:
        (K, number).
    """
    if counts.shape[1] % number:
        return (counts.sum(1, keepdim=True) / number).expand(-1, number)
    return counts.unflatten(1, (number, -1)).sum(2)
