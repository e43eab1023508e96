"""Pictures of predictions and of active tokens. Images are (H, W, 3), 8 bits, blue first, as OpenCV has them."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from mmdyt.files import whole_file

MARGIN = 8
FONT = dict(fontFace=cv2.FONT_HERSHEY_SIMPLEX, fontScale=0.45, color=(0, 0, 0), thickness=1, lineType=cv2.LINE_AA)


def paint_labels(labels: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
    """Paint class indices (H, W) in the colours of an OpenMMLab ``palette`` (red first); black where there is none."""
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = np.asarray(palette)[:, ::-1]
    return colours[labels]


def heat_map(share: np.ndarray) -> np.ndarray:
    """Paint shares (H, W) in [0, 1]: dark violet is 0, yellow is 1."""
    return cv2.applyColorMap((np.asarray(share) * 255).round().astype(np.uint8), cv2.COLORMAP_VIRIDIS)


def caption(text: str, width: int, height: int = 24) -> np.ndarray:
    """A white strip (height, width, 3) with black text; OpenCV knows ASCII only, and crashes on some of the rest."""
    text = text.encode('ascii', 'replace').decode()
    return cv2.putText(np.full((height, width, 3), 255, np.uint8), text, (0, height - 8), **FONT)


def legend(names: Sequence[str], colours: np.ndarray, width: int) -> np.ndarray:
    """A strip (24, width, 3) with a square of each colour (K, 3) and its name beside it."""
    strip = caption('', width)
    for x, name, colour in zip(np.linspace(0, width, len(names) + 1).astype(int), names, colours, strict=False):
        strip[6:18, x : x + 12] = colour
        cv2.putText(strip, name, (x + 17, 16), **FONT)
    return strip


def picture_table(titles: Sequence[str], rows: Sequence[Sequence[np.ndarray]], cell: int = 160) -> np.ndarray:
    """Lay pictures out in rows under titles, each scaled to ``cell`` x ``cell`` pixels without smoothing."""
    size, interpolation = (cell, cell), cv2.INTER_NEAREST
    pictures = [[cv2.resize(picture, size, interpolation=interpolation) for picture in row] for row in rows]
    return stack([beside([caption(title, cell) for title in titles])] + [beside(row) for row in pictures])


def beside(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Put pictures of one height side by side, with white between them."""
    gap = np.full((len(pictures[0]), MARGIN, 3), 255, np.uint8)
    return np.hstack([part for picture in pictures for part in (picture, gap)][:-1])


def stack(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Put pictures of one width below each other, with white between them."""
    return beside([picture.swapaxes(0, 1) for picture in pictures]).swapaxes(0, 1)


def framed(picture: np.ndarray) -> np.ndarray:
    """Add a white margin."""
    return cv2.copyMakeBorder(picture, *[MARGIN] * 4, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def write_picture(file: Path, picture: np.ndarray) -> None:
    """Write a picture; its ending says which kind. OpenCV itself does not say when it could not."""
    with whole_file(file, 'wb') as stream:
        stream.write(cv2.imencode(file.suffix, picture)[1])
