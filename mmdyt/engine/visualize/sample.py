"""What is known of one image or clip after it was tested: what ran where, what it cost, what came out."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class LayerCost:
    """Multiply-adds of one dispatched branch as a function of the share of active patch tokens.

    Attributes:
        label: Of the branch, ``layer_3``, or ``layer_3_mlp`` where a layer has two.
        points: Pairs of a share in [0, 1] and multiply-adds per image, shares rising from 0 to 1; between them the cost
            is nearly linear.
    """

    label: str
    points: tuple[tuple[float, float], ...]


@dataclass
class SampleDispatch:
    """Which tokens of an image or clip ran which branch, in the coordinates of the image.

    L dispatched branches, T frames (1 for images), H' x W' cells of the map, H x W pixels.

    Attributes:
        name: Of the file, or the place in the data set.
        layers: Names of the L branches, in network order: ``layer_0``, or ``layer_0_attn``, ``layer_0_mlp``.
        masks: (L, T, H', W'), share in [0, 1] of what was seen of a cell that was active; NaN where nothing was seen.
        logits: (L, T, H', W'), mean logits of the gates; NaN likewise. None where there are none.
        run_rates: Activation rate of each branch in all passes, (L,); None is the mean of its map. A clip's map is that
            of its first view.
        pictures: T pictures (H, W, 3), 8 bits, blue first, as OpenCV has them.
        extent: Height and width of the map, as fractions of those of the picture: above 1 where its last cells reach
            beyond, as those of a picture of 540 pixels in patches of 16 do.
        gmacs: What it cost, all windows, views and augmentations together; 10^9 multiply-adds.
        gmacs_dense: The same of the plain ViT.
        costs: Of each branch, in the order of ``layers``; empty where that is not known.
        gmacs_rest: What no dispatcher decides about; ``gmacs`` is this and the sum of the branches.
        classes: Names of the classes; empty where there are none.
        palette: Their colours, red first.
        prediction: For segmentation (H, W) class indices, else the index of a class; None where there is none.
        truth: As ``prediction``; 255 is ignored.
        scores: Of each class, for classification and video; None where there are none.
    """

    name: str
    layers: Sequence[str]
    masks: np.ndarray
    pictures: Sequence[np.ndarray]
    gmacs: float
    gmacs_dense: float
    extent: tuple[float, float] = (1.0, 1.0)
    logits: np.ndarray | None = None
    run_rates: np.ndarray | None = None
    costs: Sequence[LayerCost] = ()
    gmacs_rest: float = 0.0
    classes: Sequence[str] = ()
    palette: Sequence[Sequence[int]] = field(default_factory=list)
    prediction: np.ndarray | int | None = None
    truth: np.ndarray | int | None = None
    scores: np.ndarray | None = None

    def rates(self) -> np.ndarray:
        """Activation rate of each branch, (L,)."""
        if self.run_rates is not None:
            return self.run_rates
        return np.nanmean(self.masks.reshape(len(self.layers), -1), axis=1)

    @property
    def rate(self) -> float:
        """Mean over the branches of their activation rates."""
        return float(self.rates().mean())
