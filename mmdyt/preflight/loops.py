"""Does a loop begin and end?"""

from collections.abc import Mapping
from itertools import islice

from torch.utils.data import DataLoader


def check_lengths(options: Mapping) -> None:
    """Refuse a training that has no step, or a validation that never is due."""
    intervals = [('val_interval', options.get('val_interval', 1))]
    for milestone, interval in options.get('dynamic_intervals') or []:
        intervals.append((f'dynamic_intervals from {milestone} on', interval))
    lengths = [(name, options[name]) for name in ('max_epochs', 'max_iters') if name in options]
    for name, value in lengths + intervals:
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ValueError(f'train_cfg.{name} must be a positive integer, got {value!r}.')


def check_not_empty(loader: DataLoader, name: str) -> None:
    """Refuse a loader without a batch."""
    try:
        batches, samples = len(loader), len(loader.dataset)
    except TypeError:  # of a data set that is a stream
        return
    if batches == 0:
        raise ValueError(
            f'{name} must give at least one batch, got none of {samples} samples. A batch_size of {loader.batch_size} '
            f'with drop_last={loader.drop_last} needs as many.'
        )


def check_ends(loader: DataLoader, name: str, loop: str) -> None:
    """Refuse a sampler that gives more than twice its length: it never ends, and neither would the loop."""
    sampler = getattr(loader.batch_sampler, 'sampler', loader.sampler)
    try:
        most = 2 * max(len(sampler), len(loader.dataset)) + 1
    except TypeError:
        return
    if sum(1 for _ in islice(sampler, most)) == most:
        kind = type(sampler).__name__
        other = ', or an IterBasedTrainLoop: train_cfg=dict(by_epoch=False, max_iters=N)' * name.startswith('train')
        raise ValueError(
            f'{name}.sampler must end within a {loop}, got {kind}, which goes on. Use DefaultSampler{other}.'
        )
