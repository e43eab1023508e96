"""From files and arrays to what a model is given. H x W pixels, T frames."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mmengine.registry import TRANSFORMS

from mmdyt.datasets.files import find_files
from mmdyt.files import BadFileError
from mmdyt.preflight.names import name_of

LISTS = '.txt'

Source = str | Path | np.ndarray


@dataclass
class Sample:
    """One input, ready for a model.

    Attributes:
        name: Of its file, or its place among the inputs.
        packed: What the pipeline made of it.
        pictures: The image, or the frames of the first view of a clip, as they are before the pipeline changes them:
            (H, W, 3), 8 bits, blue first.
    """

    name: str
    packed: dict
    pictures: list[np.ndarray]


class Reader:
    """Runs the pipeline of a test on files and arrays; labels are not wanted.

    Args:
        pipeline: Configs of its steps. Is built in the present default scope.
        video: Whether it reads clips.

    Raises:
        ValueError: If no step reads an image, or opens and decodes a video.
    """

    def __init__(self, pipeline: Sequence[dict], video: bool):
        steps = [(name_of(step['type']), step) for step in pipeline]
        steps = [(name, step) for name, step in steps if 'LoadAnnotations' not in name]
        names = [name for name, _ in steps]
        wanted = 'Decode' if video else 'LoadImage'
        if not any(wanted in name for name in names):
            what = 'open and decode a video (mmdyt.OpenClip, mmdyt.DecodeClip)' if video else 'load an image'
            raise ValueError(f'pipeline must {what}, got none of that in {", ".join(names) or "no steps"}.')
        self.video = video
        self._steps = [TRANSFORMS.build(step) for _, step in steps]
        self._loads = next(i for i, name in enumerate(names) if wanted in name)
        self._opens = {i for i, name in enumerate(names) if 'OpenClip' in name or name.endswith('Init')}
        self._from_array = TRANSFORMS.build(dict(type='mmaction.ArrayDecode')) if video else None

    def read(self, source: Source, name: str) -> Sample:
        """Run the pipeline on one file or array.

        Args:
            source: A path; or an image (H, W, 3), blue first as OpenCV has it; or the frames (T, H, W, 3) of a clip,
                red first. Arrays are of 8 bits.
            name: Of the sample.

        Raises:
            BadFileError: If a file is missing, broken, or does not suit the pipeline.
            TypeError: If it is something else.
            ValueError: If an array has another shape.
        """
        if not isinstance(source, np.ndarray):
            return self._read_file(source, name)
        self._check_array(source)
        if not self.video:
            image = source.astype(np.float32) if getattr(self._steps[self._loads], 'to_float32', False) else source
            results = dict(img=image, img_shape=source.shape[:2], ori_shape=source.shape[:2])
            return Sample(name, self._run(results, self._loads + 1), [source])
        frames = dict(array=source, total_frames=len(source), start_index=0, modality='RGB')
        for i in self._opens:
            wanted = getattr(self._steps[i], 'min_frames', 1)
            if len(source) < wanted:
                raise ValueError(f'inputs must be clips of at least {wanted} frames, got {len(source)}.')
        return self._sample(name, frames)

    def _read_file(self, path: str | Path, name: str) -> Sample:
        """Run the pipeline on a file, which any error is about."""
        if not isinstance(path, str | Path):
            raise TypeError(f'inputs must be paths or arrays, got {type(path).__name__}.')
        path = os.path.expanduser(path)
        if not os.path.isfile(path):
            raise BadFileError(f'inputs must name existing files, got {path}.')
        start = dict(filename=path, start_index=0, modality='RGB') if self.video else dict(img_path=path)
        return self._sample(name, start)

    def _sample(self, name: str, results: dict) -> Sample:
        """All steps; in between, the pictures."""
        results = self._run(results, 0, self._loads + 1)
        if self.video:
            first = results['imgs'][: results.get('clip_len') or None]
            pictures = [np.ascontiguousarray(frame[..., ::-1]) for frame in first]
        else:
            pictures = [results['img']]
        return Sample(name, self._run(results, self._loads + 1), [to_bytes(picture) for picture in pictures])

    def _run(self, results: dict, first: int, end: int | None = None) -> dict:
        """Some of the steps."""
        for i, step in list(enumerate(self._steps))[first:end]:
            if 'array' in results and i in self._opens:
                continue
            step = self._from_array if 'array' in results and i == self._loads else step
            results = step(results)
            if results is None:
                raise BadFileError(f'inputs must suit the pipeline, got one that {type(step).__name__} leaves out.')
        return results

    def _check_array(self, array: np.ndarray) -> None:
        wanted, axes = ('a clip (T, H, W, 3)', 4) if self.video else ('an image (H, W, 3)', 3)
        if array.ndim != axes or array.shape[-1] != 3 or array.dtype != np.uint8 or not array.size:
            raise ValueError(f'inputs must be {wanted} of 8 bits, got {array.dtype} of shape {array.shape}.')


def to_bytes(picture: np.ndarray) -> np.ndarray:
    """A picture in 8 bits with three channels."""
    picture = picture if picture.ndim == 3 else picture[..., None]
    picture = np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture[..., :3]
    return np.ascontiguousarray(picture.clip(0, 255).astype(np.uint8))


def is_single(inputs: Source | Sequence[Source]) -> bool:
    """Whether ``inputs`` are one file or array, and not several, a folder or a list."""
    if not isinstance(inputs, str | Path):
        return isinstance(inputs, np.ndarray)
    return not (Path(inputs).expanduser().is_dir() or str(inputs).lower().endswith(LISTS))


def sources_of(inputs: Source | Sequence[Source], video: bool) -> list[Source]:
    """The single files and arrays that a user named: files, folders, lists of files, arrays.

    Args:
        inputs: One or several. A list is a ``.txt`` with a path a line, relative to it or to the working directory; a
            label behind a path is passed over, as in lists of data sets.
        video: Whether videos are wanted; else images.

    Raises:
        FileNotFoundError: If a path is missing, or a folder has no such file, or a list is empty.
        ValueError: If a file is of another kind.
    """
    several = inputs if isinstance(inputs, list | tuple) else [inputs]
    found = []
    for source in several:
        if not isinstance(source, str | Path):
            found.append(source)
        elif str(source).lower().endswith(LISTS) and Path(source).is_file():
            found += _listed(Path(source))
        else:
            found += find_files([str(Path(source).expanduser())], video)
    return found


def _listed(file: Path) -> list[str]:
    """The paths in a list; what is missing is found out when it is read."""
    lines = [line.strip() for line in file.read_text(encoding='utf-8').splitlines()]
    lines = [line for line in lines if line and not line.startswith('#')]
    if not lines:
        raise FileNotFoundError(f'{file} must list a path a line, got none.')
    return [_place(line, file.parent) for line in lines]


def _place(line: str, folder: Path) -> str:
    """The file that a line names, or the line where there is none."""
    for name in (line, line.rpartition(' ')[0]):
        for path in (folder / name, Path(name)):
            if name and path.is_file():
                return str(path)
    return line
