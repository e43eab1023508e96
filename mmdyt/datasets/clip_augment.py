"""Augmentation of clips that mmaction2 leaves to a package of its own."""

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from torchvision.transforms.v2 import InterpolationMode, RandAugment

from mmdyt.registry import TRANSFORMS


@TRANSFORMS.register_module()
class ClipRandAugment(BaseTransform):
    """torchvision's ``RandAugment``, every frame of a clip by the same operations.

    paper silent: which RandAugment "m7 n4" means; here magnitude 7 of 10, on torchvision's operations. mmaction2's own
    needs pytorchvideo, which is no longer kept up.

    Args:
        num_ops: Operations in a row.
        magnitude: Their strength, 0 to 10.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, num_ops: int = 4, magnitude: int = 7):
        if isinstance(num_ops, bool) or not (isinstance(num_ops, int) and num_ops >= 1):
            raise ValueError(f'num_ops must be a positive integer, got {num_ops!r}.')
        if isinstance(magnitude, bool) or not (isinstance(magnitude, int) and 0 <= magnitude <= 10):
            raise ValueError(f'magnitude must be an integer in [0, 10], got {magnitude!r}.')
        self.augment = RandAugment(
            num_ops, magnitude, num_magnitude_bins=11, interpolation=InterpolationMode.BILINEAR, fill=128
        )

    def transform(self, results: dict) -> dict:
        """Change ``imgs``, a list of (H, W, 3) frames in 8 bits."""
        clip = torch.from_numpy(np.stack(results['imgs'])).permute(0, 3, 1, 2)  # (T, 3, H, W)
        results['imgs'] = list(self.augment(clip).permute(0, 2, 3, 1).numpy())
        return results

    def __repr__(self) -> str:
        """Name and options."""
        return f'{type(self).__name__}({self.augment.extra_repr()})'
