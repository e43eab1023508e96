"""Images to time inference on: of the test set, or generated; other ones in each round."""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from mmdyt.engine.host import is_recognizer

MOST = 256  # images in memory, unless a batch needs more
GRAIN = 16  # pixels: generated images are about that smooth


class Images:
    """Images of one shape, normalised.

    Args:
        pool: (M, 3, H, W), or views of clips (M, 3, T, H, W), in fp32 on the CPU.
        source: ``'real'`` or ``'generated'``.
    """

    def __init__(self, pool: Tensor, source: str):
        self.pool = pool
        self.source = source

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return tuple(self.pool.shape[-2:])

    @property
    def frames(self) -> int | None:
        """Frames of a view; None for images."""
        return self.pool.shape[2] if self.pool.dim() == 5 else None

    def deal(self, batch: int, rounds: int, seed: int, like: Tensor) -> 'Batches':
        """Batches for some rounds, dealt like cards: no image comes again before all have come.

        Args:
            batch: Images in each; within one they repeat only where there are fewer.
            rounds: How many batches.
            seed: Of the order.
            like: A tensor on the device and in the dtype of the network.
        """
        generator = torch.Generator().manual_seed(seed)
        times = -(-batch * rounds // len(self.pool))
        order = torch.cat([torch.randperm(len(self.pool), generator=generator) for _ in range(times)])
        return Batches(self.pool, order[: batch * rounds].split(batch), like)


class Batches(Sequence[Tensor]):
    """Batches of a pool of images, gathered and moved when they are asked for: all at once would fill a GPU.

    Args:
        pool: (M, ...).
        hands: Which images are in each batch.
        like: As of :meth:`Images.deal`.
    """

    def __init__(self, pool: Tensor, hands: Sequence[Tensor], like: Tensor):
        self._pool, self._hands, self._like = pool, hands, like

    def __len__(self) -> int:
        return len(self._hands)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return Batches(self._pool, self._hands[i], self._like)
        return self._pool[self._hands[i]].to(self._like.device, self._like.dtype)


def pool_size(batches: Sequence[int], rounds: int) -> int:
    """How many images are worth having in memory."""
    largest = max(batches)
    return min(largest * rounds, max(MOST, 2 * largest))


def real_images(host: nn.Module, loader: DataLoader, number: int, shape: tuple[int, int] | None, seed: int) -> Images:
    """A random choice of a data set's images, through its pipeline and the host's data preprocessor.

    Images of another size than ``shape`` are resized to cover it, and cut around the centre.

    Args:
        host: A model of mmpretrain, mmseg or mmaction2 on the CPU. All views of its clips count as images.
        loader: Of its test.
        number: How many, at most.
        shape: Height and width in pixels; None is the window of a sliding test, or the size of the first image.
        seed: Of the choice.
    """
    order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    shape = shape or window(host)
    found = []
    for index in order:
        batch = loader.collate_fn([loader.dataset[index]])
        inputs = host.data_preprocessor(batch, False)['inputs']
        inputs = inputs.flatten(0, 1) if is_recognizer(host) else inputs
        shape = shape or tuple(inputs.shape[-2:])
        found += list(_cover(inputs.float(), shape))
        if len(found) >= number:
            break
    return Images(torch.stack(found[:number]), 'real')


def generated_images(host: nn.Module, number: int, shape: tuple[int, int] | None, frames: int | None, seed: int):
    """Smooth random images with some noise, of mean 0 and standard deviation 1.

    Args:
        host: Whose backbone says how large they are where ``shape`` is None and no window does.
        number: How many.
        shape: Height and width in pixels.
        frames: Of a view; None makes images.
        seed: Of the pixels.
    """
    height, width = shape or window(host) or host.backbone.img_size
    generator = torch.Generator().manual_seed(seed)
    sizes = number * (frames or 1), 3
    coarse = torch.randn(*sizes, height // GRAIN + 2, width // GRAIN + 2, generator=generator)
    pool = F.interpolate(coarse, (height, width), mode='bilinear')
    pool += 0.1 * torch.randn(pool.shape, generator=generator)
    pool = pool / pool.std()
    if frames:
        pool = pool.unflatten(0, (number, frames)).transpose(1, 2).contiguous()
    return Images(pool, 'generated')


def window(host: nn.Module) -> tuple[int, int] | None:
    """Height and width of the windows of a sliding test; None where images are tested whole."""
    test = getattr(host, 'test_cfg', None) or {}
    return tuple(test['crop_size']) if test.get('mode') == 'slide' else None


def _cover(inputs: Tensor, shape: tuple[int, int]) -> Tensor:
    """Images (M, 3, [T,] H, W) resized to cover a shape, and cut around the centre."""
    size = inputs.shape[-2:]
    if tuple(size) == tuple(shape):
        return inputs
    frames = inputs.transpose(1, 2).flatten(0, 1) if inputs.dim() == 5 else inputs
    factor = max(wanted / side for wanted, side in zip(shape, size, strict=True))
    covering = [max(wanted, round(side * factor)) for wanted, side in zip(shape, size, strict=True)]
    if covering != list(size):
        frames = F.interpolate(frames, covering, mode='bilinear', antialias=True)
    top, left = ((side - wanted) // 2 for side, wanted in zip(covering, shape, strict=True))
    frames = frames[..., top : top + shape[0], left : left + shape[1]]
    return frames.unflatten(0, (len(inputs), -1)).transpose(1, 2) if inputs.dim() == 5 else frames
