"""Which images of a rank are its own: samplers repeat some until all ranks have equally many."""

import math
from collections.abc import Callable

from mmengine.dataset import DefaultSampler
from torch import Tensor
from torch.utils.data import DataLoader

from mmdyt.engine.finite import file_of


def count_own(loader: DataLoader | None) -> float:
    """How many of the first samples of a loader are this rank's own; what follows repeats samples of other ranks.

    mmengine's samplers deal the samples out in turns and begin again where they end unevenly. Its metrics drop what
    they gather beyond the length of the data set, and so must all that is summed over ranks.

    Returns:
        Infinity where nothing is repeated.
    """
    sampler = getattr(getattr(loader, 'batch_sampler', None), 'sampler', None)
    if not (isinstance(sampler, DefaultSampler) and sampler.round_up):
        return math.inf
    samples, rank, ranks = len(sampler.dataset), sampler.rank, sampler.world_size
    if getattr(sampler, 'subsample_type', None) == 'sequential':  # mmpretrain's, which deals out chunks
        return min(max(samples - rank * sampler.num_samples, 0), sampler.num_samples)
    return math.ceil((samples - rank) / ranks)


def place_in_dataset(loader: DataLoader | None) -> Callable[[int], int]:
    """Where in the data set the i-th sample of this rank stands; without a sampler that tells, i itself."""
    sampler = getattr(getattr(loader, 'batch_sampler', None), 'sampler', None)
    if not isinstance(sampler, DefaultSampler):
        return int
    if getattr(sampler, 'subsample_type', None) == 'sequential':
        return lambda i: sampler.rank * sampler.num_samples + i
    return lambda i: sampler.rank + i * sampler.world_size


def name_in_dataset(loader: DataLoader | None) -> Callable[[int], str]:
    """The file of the sample at a place of the data set, or the place where none is known."""
    dataset = getattr(loader, 'dataset', None)
    shuffled = getattr(getattr(getattr(loader, 'batch_sampler', None), 'sampler', None), 'shuffle', False)

    def name(place: int) -> str:
        known = hasattr(dataset, 'get_data_info') and place < len(dataset) and not shuffled
        return (file_of(dataset.get_data_info(place)) if known else None) or f'sample {place}'

    return name


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
