"""Made-up samples of dispatch, of each task, as small as can be."""

import numpy as np

from mmdyt.engine.visualize.sample import LayerCost, SampleDispatch

LAYERS = ['layer_0', 'layer_1', 'layer_2']
POINTS = ((0.0, 1e8), (0.5, 3e8), (1.0, 9e8))
REST, DENSE = 2.0, 5.0
PALETTE = [[200, 40, 10], [0, 90, 250], [30, 200, 60]]


def cost(rates: np.ndarray) -> float:
    """GMACs at some rates."""
    return REST + sum(np.interp(rate, *zip(*POINTS, strict=True)) for rate in rates) / 1e9


def sample(name: str, shift: float = 0.0, frames: int = 1, **more) -> SampleDispatch:
    """Three branches on 4 x 5 cells of pictures of 40 x 60 pixels."""
    rng = np.random.default_rng(len(name))
    logits = rng.normal(shift, 2, (3, frames, 4, 5)) + np.array([1.0, 0.0, -1.0]).reshape(3, 1, 1, 1)
    masks = (logits > 0).astype(float)
    more = {'logits': logits, **more}
    return SampleDispatch(
        name, LAYERS, masks, list(rng.integers(0, 255, (frames, 40, 60, 3), np.uint8)),
        gmacs=cost(masks.mean((1, 2, 3))), gmacs_dense=DENSE, gmacs_rest=REST,
        costs=[LayerCost(layer, POINTS) for layer in LAYERS], **more,
    )  # fmt: skip


def segmented(name: str, **more) -> SampleDispatch:
    """Classes left and right, some ignored; the prediction knows a third."""
    truth = np.repeat([[0, 1]], 40, 0).repeat(30, 1).astype(np.uint8)
    prediction = truth.copy()
    truth[:5], prediction[30:] = 255, 2
    return sample(name, truth=truth, prediction=prediction, classes=['sky', 'car', 'road'], palette=PALETTE, **more)


def classified(name: str, **more) -> SampleDispatch:
    return sample(name, truth=1, prediction=2, classes=['cat', 'dog', 'bee'], scores=np.array([0.1, 0.2, 0.7]), **more)
