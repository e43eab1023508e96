"""Colour jitter under NumPy 2, which no longer wraps integers that do not fit in 8 bits."""

import types
from functools import wraps

from .imports import replace


def repair_mmcv_hue(photometric: types.ModuleType) -> None:
    """Let ``mmcv.adjust_hue`` shift hues downwards: ``np.uint8(-19)`` raises since NumPy 2.

    mmpretrain's ``ColorJitter(hue=...)`` dies of it on every second image.
    """
    import numpy as np

    try:
        photometric.adjust_hue(np.zeros((1, 1, 3), np.uint8), -0.25, backend='cv2')
    except OverflowError:
        replace('mmcv', 'adjust_hue', _wrapping_hue(photometric.adjust_hue))


class _CyclicFloat(float):
    """A number whose products are what 8 bits keep of them, as they were for NumPy 1."""

    def __mul__(self, other: float) -> int:
        return int(float(self) * other) % 256


def _wrapping_hue(adjust_hue):
    @wraps(adjust_hue)
    def wrapping(img, hue_factor, backend=None):
        return adjust_hue(img, _CyclicFloat(hue_factor), backend)

    return wrapping


def repair_mmaction_hue(processing: types.ModuleType) -> None:
    """Let mmaction's ``ColorJitter`` shift hues as it says, modulo 180.

    It adds a Python integer to 8 bits. Since NumPy 2 the sum stays in 8 bits: it raises for negative shifts, and is
    taken modulo 256 for others, which gives wrong colours without a word.
    """
    import numpy as np

    magenta = np.full((1, 1, 3), (255, 0, 255), np.uint8)  # hue 150, so 150 + 127 does not fit
    try:
        right = np.array_equal(processing.ColorJitter.adjust_hue(magenta, 0.5), _adjust_hue(magenta, 0.5))
    except OverflowError:
        right = False
    if not right:
        processing.ColorJitter.adjust_hue = staticmethod(_adjust_hue)


def _adjust_hue(img, factor):
    """Shift the hues of an RGB image, (H, W, 3), by a fraction of 255 on OpenCV's circle of 180."""
    import cv2
    import numpy as np

    hsv = cv2.cvtColor(np.clip(img, 0, 255).astype(np.uint8), cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(int) + int(factor * 255)) % 180
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).astype(np.float32)
