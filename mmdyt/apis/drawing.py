"""Pictures of predictions, and the folder that they and their lines of JSON go to. Pictures are blue first."""

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from mmdyt.engine.pictures import caption, framed, legend, paint_labels, stack, write_picture
from mmdyt.engine.visualize.draw import file_stem
from mmdyt.engine.visualize.overlays import contact, distinct_colours, fit, sheet

from .prediction import Prediction, Skipped

LINES = 'predictions.jsonl'
OPACITY = 0.5
LEAST = 480  # pixels across, of a picture with words under it
FRAME = 240  # pixels across
FRAMES = 8  # of a clip that are shown
NAMED = 4  # classes in a legend


def answer_picture(prediction: Prediction, palette: Sequence[Sequence[int]] = ()) -> np.ndarray:
    """The input with what the model says of it.

    A segmentation is painted over the image, at its full size, with a legend of the largest classes; an image or clip
    has its best classes under it.

    Args:
        prediction: With pictures.
        palette: Colours of the classes, red first; where there are none, such as are far apart.
    """
    if prediction.segmentation is not None:
        return _painted(prediction, palette)
    if len(prediction.pictures) > 1:
        places = np.linspace(0, len(prediction.pictures) - 1, min(len(prediction.pictures), FRAMES)).round().astype(int)
        frames = [fit(prediction.pictures[i], FRAME) for i in places]
        picture = contact(frames, [f'frame {i}' for i in places])
    else:
        picture = fit(prediction.pictures[0], max(prediction.pictures[0].shape[1], LEAST))
    words = [f'{name}: {score:.3f}' for name, _, score in prediction.top]
    return framed(
        stack([picture, np.vstack([caption(text, picture.shape[1]) for text in [*words, _cost(prediction)]])])
    )


def token_picture(prediction: Prediction) -> np.ndarray | None:
    """Which tokens ran, the mean of the branches and each (:func:`mmdyt.engine.visualize.overlays.sheet`).

    Args:
        prediction: With pictures.

    Returns:
        None where nothing is skipped.
    """
    return None if prediction.dispatch is None else sheet(prediction.dispatch)


def _painted(prediction: Prediction, palette: Sequence[Sequence[int]]) -> np.ndarray:
    labels, (image,) = prediction.segmentation, prediction.pictures
    palette = palette or distinct_colours(int(labels.max()) + 1)
    image = cv2.resize(image, labels.shape[::-1], interpolation=cv2.INTER_AREA)
    over = cv2.addWeighted(image, 1 - OPACITY, paint_labels(labels, palette), OPACITY, 0)
    largest = prediction.top[:NAMED]
    colours = paint_labels(np.array([one.label for one in largest]), palette)
    width = max(over.shape[1], LEAST)
    over = cv2.copyMakeBorder(over, 0, 0, 0, width - over.shape[1], cv2.BORDER_CONSTANT, value=(255, 255, 255))
    words = [f'{one.name} {one.score:.0%}' for one in largest]
    return stack([over, legend(words, colours, width), caption(_cost(prediction), width)])


def _cost(prediction: Prediction) -> str:
    rate = '' if prediction.rate is None else f', activation rate {prediction.rate:.3f}'
    return f'{prediction.gmacs:.4g} of {prediction.gmacs_dense:.4g} GMACs{rate}'


class ResultFolder:
    """A folder that predictions are written into as they come: what is written stays, whatever happens then.

    ``predictions.jsonl`` has a line for each input; ``0000_cat_answer.png``, ``0000_cat_tokens.png`` and for
    segmentation ``0000_cat_classes.png``, the class of each pixel in grey, lie beside it.

    Args:
        folder: Made where it is missing. Files of the same names are replaced.
        palette: Of the classes.
        pictures: Whether pictures are drawn.
    """

    def __init__(self, folder: str | Path, palette: Sequence[Sequence[int]] = (), pictures: bool = True):
        self.folder, self.palette, self.pictures = Path(folder), palette, pictures
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / LINES
        self._number = 0
        self._stream = self.file.open('w', encoding='utf-8')

    def __enter__(self) -> 'ResultFolder':
        return self

    def __exit__(self, *error) -> None:
        self._stream.close()

    def add(self, found: Prediction | Skipped) -> None:
        """Draw one input, then write its line: where there is a line, there are pictures."""
        if self.pictures and isinstance(found, Prediction):
            self._draw(found, f'{self._number:04d}_{file_stem(found.file)}')
        self._stream.write(json.dumps(found.line(), allow_nan=False) + '\n')
        self._stream.flush()
        self._number += 1

    def _draw(self, found: Prediction, stem: str) -> None:
        pictures = dict(answer=answer_picture(found, self.palette), tokens=token_picture(found))
        if found.segmentation is not None:
            kind = np.uint8 if found.segmentation.max() < 256 else np.uint16
            pictures['classes'] = found.segmentation.astype(kind)
        for name, picture in pictures.items():
            if picture is not None:
                write_picture(self.folder / f'{stem}_{name}.png', picture)
