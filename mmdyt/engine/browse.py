"""What a model sees of a data set: pictures after the pipeline and the preprocessor. Pictures are blue first."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn as nn
from mmengine.dataset import BaseDataset, pseudo_collate
from torch import Tensor

from mmdyt.engine.pictures import caption, framed, legend, paint_labels, stack
from mmdyt.engine.visualize.overlays import contact, distinct_colours, fit

OPACITY = 0.5
CELL = 240  # pixels across and down in the contact sheet
FRAME = 160  # pixels across, of a frame of a clip
LEAST = 480  # pixels across, of a picture with words under it
NAMED = 4  # classes in a legend
IGNORED = 255  # the label that mmseg ignores


class Seen(NamedTuple):
    """One sample as a model gets it.

    Args:
        pictures: The image, or the frames of the first view of a clip, (H, W, 3), 8 bits.
        labels: Of an image or clip.
        mask: Label of each pixel, (H, W), 255 where it is ignored; None where the data has none.
    """

    pictures: list[np.ndarray]
    labels: list[int]
    mask: np.ndarray | None


def see(preprocessor: nn.Module, packed: dict, training: bool) -> Seen:
    """Run a model's preprocessor on one sample, and undo its normalisation.

    Args:
        preprocessor: Of the model: it may pad, reorder channels, normalise.
        packed: What the pipeline made, ``inputs`` (C, H, W), or for clips (views, C, T, H, W) or (frames, C, H, W).
        training: Whether the sample is treated as in training.
    """
    with torch.no_grad():
        batch = preprocessor(pseudo_collate([packed]), training)
    (sample,) = batch['data_samples']
    inputs = batch['inputs'][0].float()
    clip = inputs.ndim > 3
    if inputs.ndim == 5:
        inputs = inputs[0].transpose(0, 1)  # the first view, (T, C, H, W)
    frames = _unnormalised(preprocessor, inputs if clip else inputs[None])
    red_first = clip != _swaps(preprocessor)  # images are read blue first, videos red first
    pictures = [_to_picture(frame, red_first) for frame in frames]
    truth = getattr(sample, 'gt_sem_seg', None)
    label = getattr(sample, 'gt_label', None)
    labels = [] if label is None else torch.as_tensor(label).flatten().tolist()
    return Seen(pictures, labels, None if truth is None else truth.data[0].cpu().numpy())


def draw_seen(seen: Seen, name: str, classes: Sequence[str] = (), palette: Sequence[Sequence[int]] = ()) -> np.ndarray:
    """A picture with its name and classes; masks are painted over it, the frames of a clip stand in a strip.

    Args:
        seen: The sample.
        name: Of its file.
        classes: Their names.
        palette: Their colours, red first; where there are none, such as are far apart.
    """
    height, width = seen.pictures[0].shape[:2]
    size = f'{name}, {width} x {height} pixels'
    if len(seen.pictures) > 1:
        picture = contact([fit(one, FRAME) for one in seen.pictures], [f'frame {i}' for i in range(len(seen.pictures))])
        size = f'{size}, {len(seen.pictures)} frames'
    else:
        picture = fit(_painted(seen, palette), max(width, LEAST))
    words = [caption(size, picture.shape[1])]
    if seen.mask is not None:
        words.append(_mask_legend(seen.mask, classes, palette, picture.shape[1]))
    elif seen.labels:
        words.append(caption(_words(seen, classes), picture.shape[1]))
    return framed(stack([picture, np.vstack(words)]))


def contact_sheet(samples: Sequence[Seen], classes: Sequence[str] = (), palette=()) -> np.ndarray:
    """All samples side by side, each under its class; of a clip the frame in the middle."""
    pictures = []
    for seen in samples:
        picture = seen.pictures[len(seen.pictures) // 2] if seen.mask is None else _painted(seen, palette)
        pictures.append(_in_cell(picture))
    return framed(contact(pictures, [_words(seen, classes) for seen in samples]))


def count_labels(dataset: BaseDataset, classes: Sequence[str]) -> str:
    """How many samples a data set has, of each class where samples have one."""
    infos = (dataset.get_data_info(i) for i in range(len(dataset)))
    found = Counter(info.get('gt_label', info.get('label')) for info in infos)
    if any(not isinstance(label, int) for label in found):
        return f'{len(dataset)} samples'
    counts = [f'{_name(label, classes)} {number}' for label, number in sorted(found.items())]
    return f'{len(dataset)} samples: {", ".join(counts)}'


def wrong_labels(packed: dict, classes: int) -> list[int]:
    """Labels of a sample's mask that are no classes."""
    truth = getattr(packed['data_samples'], 'gt_sem_seg', None)
    values = [] if truth is None else truth.data.unique().tolist()
    return [value for value in values if value >= classes and value != IGNORED]


def _unnormalised(preprocessor: nn.Module, frames: Tensor) -> Tensor:
    """Frames (T, C, H, W) in [0, 255]."""
    if not getattr(preprocessor, '_enable_normalize', False):
        return frames
    mean, std = (torch.as_tensor(value).float().reshape(1, -1, 1, 1) for value in (preprocessor.mean, preprocessor.std))
    return frames * std + mean


def _swaps(preprocessor: nn.Module) -> bool:
    """Whether a preprocessor turns the order of colours round; hosts name that in different ways."""
    names = ('to_rgb', 'channel_conversion', '_channel_conversion')
    return any(getattr(preprocessor, name, False) for name in names)


def _to_picture(frame: Tensor, red_first: bool) -> np.ndarray:
    picture = frame.clamp(0, 255).round().byte().permute(1, 2, 0).cpu().numpy()
    picture = np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture
    return np.ascontiguousarray(picture[..., ::-1] if red_first else picture)


def _painted(seen: Seen, palette: Sequence[Sequence[int]]) -> np.ndarray:
    """The image; with a mask, its classes in colour over it, and ignored pixels as they are."""
    (image,) = seen.pictures
    if seen.mask is None:
        return image
    colours = paint_labels(seen.mask, palette or distinct_colours(int(seen.mask.max()) + 1))
    both = cv2.addWeighted(image, 1 - OPACITY, colours, OPACITY, 0)
    return np.where((seen.mask == IGNORED)[..., None], image, both)


def _mask_legend(mask: np.ndarray, classes: Sequence[str], palette: Sequence, width: int) -> np.ndarray:
    """The largest classes of a mask and their shares."""
    labels, counts = np.unique(mask[mask != IGNORED], return_counts=True)
    if not len(labels):
        return caption('all is ignored', width)
    order = np.argsort(-counts)[:NAMED]
    colours = paint_labels(labels[order], palette or distinct_colours(int(labels.max()) + 1))
    words = [f'{_name(labels[i], classes)} {counts[i] / mask.size:.0%}' for i in order]
    return legend(words, colours, width)


def _words(seen: Seen, classes: Sequence[str]) -> str:
    """The classes of a sample."""
    labels = seen.labels
    if seen.mask is not None:
        labels = [label for label in np.unique(seen.mask).tolist() if label != IGNORED]
    return ', '.join(_name(label, classes) for label in labels) or 'no label'


def _name(label: int, classes: Sequence[str]) -> str:
    return str(classes[label]) if 0 <= label < len(classes) else f'class {label}'


def _in_cell(picture: np.ndarray) -> np.ndarray:
    """A picture in the middle of a white square."""
    height, width = picture.shape[:2]
    scale = CELL / max(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    cell = np.full((CELL, CELL, 3), 255, np.uint8)
    top, left = (CELL - size[1]) // 2, (CELL - size[0]) // 2
    cell[top : top + size[1], left : left + size[0]] = cv2.resize(picture, size, interpolation=kind)
    return cell
