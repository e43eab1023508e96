"""Clips as mmaction2 reads them, but a broken one is an error that names its file.

mmaction2's readers hide much of what can be wrong with a file: a frame that is missing becomes a copy of another one.
"""

import os
import re
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO
from threading import TIMEOUT_MAX, Thread

import numpy as np
from mmaction.datasets.transforms import DecordDecode, DecordInit, PyAVDecode, PyAVInit
from mmcv.transforms import BaseTransform

from mmdyt.datasets.containers import DamagedError, WholeFiles, defies_decord, has_open_gop
from mmdyt.files import BadFileError
from mmdyt.registry import TRANSFORMS

MISPLACED = "{}, so that decord would give other frames than were asked for: encode it anew, or set reader='pyav'"
PACKAGES = dict(decord='decord', pyav='av')
# decord says the same of frames that are missing and of those that it cannot jump to
FEWER = "it has fewer frames than it lists, or decord cannot find them: set reader='pyav' to read what is there"
# what decord says, and what it means
MEANINGS = {
    'cannot find video stream': "it has no video stream, or (AV1) none that decord 0.6.0 reads: set reader='pyav'",
    'av_read_frame failed': 'it is cut short',
    'Unable to handle EOF': FEWER,
    'recovered from nearest frames': FEWER,
    'from_size == to_size': "decord 0.6.0 cannot read clips of this width: set reader='pyav'",
}


class StrictDecordInit(DecordInit):
    """Opens with decord, which is told never to give another frame in the place of one that it cannot read."""

    def __init__(self, **options):
        # read once, when decord is first imported: at the end of the file, do not go back to an earlier frame
        os.environ.setdefault('DECORD_REWIND_RETRY_MAX', '0')
        super().__init__(**options)
        self.file_client = WholeFiles(backend=self.io_backend, **self.kwargs)

    def _get_video_reader(self, filename: str):
        """Mmaction's reader has no argument for the frames that may be replaced; 0 would mean any number of them."""
        from decord import VideoReader

        content = self.file_client.get(filename)
        if kind := defies_decord(content):
            raise DamagedError(MISPLACED.format(f'it is {kind}'))
        reader = VideoReader(BytesIO(content), num_threads=self.num_threads, fault_tol=1e-6)
        # decord finds a frame by its time; before 0 are those that an edit list hides
        times = reader.get_frame_timestamp(range(len(reader)))[:, 0]
        if times[0] < 0 or (np.diff(times) <= 0).any():
            raise DamagedError(MISPLACED.format('its frames have no times of their own, or times before its start'))
        if has_open_gop(content):
            raise DamagedError(MISPLACED.format('it shows frames before the key frame that they follow (open GOP)'))
        return reader


class StrictPyAVInit(PyAVInit):
    """Opens with PyAV and counts the frames that are there, since files may state none, or more."""

    def __init__(self, **options):
        super().__init__(**options)
        self.file_client = WholeFiles(backend=self.io_backend, **self.kwargs)

    def transform(self, results: dict) -> dict:
        """Open ``filename``."""
        try:
            results = super().transform(results)
        except IndexError as error:
            raise DamagedError('it has no video stream') from error
        container = results['video_reader']
        stream = container.streams.video[0]
        shown = sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream))  # edits hide some
        results = super().transform(results)  # from the start again: files without times cannot be wound back
        # the rate as decord gives it; 0 is unknown
        return results | dict(total_frames=shown, avg_fps=float(stream.average_rate or 0))


class CountingContainer:
    """A container of PyAV that remembers how many frames it gave, and how they are to be turned."""

    def __init__(self, container):
        self.container = container
        self.streams = container.streams
        self.frames = self.quarter_turns = 0

    def decode(self, **options) -> Iterator:
        """The frames, one by one."""
        for frame in self.container.decode(**options):
            if frame.is_corrupt:
                raise DamagedError(f'its frame {self.frames} is damaged')
            self.quarter_turns = round(frame.rotation / 90)  # counter-clockwise
            self.frames += 1
            yield frame


class StrictPyAVDecode(PyAVDecode):
    """Decodes with PyAV, neither starting anew behind the last frame nor leaving a clip on its side."""

    def transform(self, results: dict) -> dict:
        """Decode the frames ``frame_inds``."""
        container = CountingContainer(results['video_reader'])
        last = int(np.max(results['frame_inds']))
        results = super().transform({**results, 'video_reader': container})
        if container.frames <= last:
            raise DamagedError(f'it has only {container.frames} of its {results["total_frames"]} frames')
        if container.quarter_turns:
            turned = [np.rot90(image, container.quarter_turns) for image in results['imgs']]
            results['imgs'] = [np.ascontiguousarray(image) for image in turned]
            results['img_shape'] = results['original_shape'] = results['imgs'][0].shape[:2]
        return results


OPENERS = dict(decord=StrictDecordInit, pyav=StrictPyAVInit)


@TRANSFORMS.register_module()
class OpenClip(BaseTransform):
    """Opens a video file and counts its frames.

    As in mmaction2, a path without an ending that names no file is that of an ``.mp4``.

    Args:
        reader: ``'decord'``, which jumps to the frames it needs, or ``'pyav'``, which decodes all frames before them,
            but has wheels for more machines and reads more kinds of files.
        min_frames: A clip with fewer frames is refused. Set what the sampler asks for, its ``clip_len``: mmaction2's
            samplers take frames of a shorter clip twice.
        timeout: Seconds, after which opening counts as failed.
        **options: Those of mmaction2's ``DecordInit`` (``num_threads``) or ``PyAVInit``; ``io_backend`` of both.

    Raises:
        ImportError: If the package of the reader is not installed.
        ValueError: If an argument is out of range; for a clip, if it is missing, broken or too short.
    """

    def __init__(self, reader: str = 'decord', min_frames: int = 1, timeout: float = 120.0, **options):
        if reader not in list(OPENERS):  # what is no word need not be hashable
            raise ValueError(f'reader must be one of {list(OPENERS)}, got {reader!r}.')
        if isinstance(min_frames, bool) or not (isinstance(min_frames, int) and min_frames >= 1):
            raise ValueError(f'min_frames must be a positive integer, got {min_frames!r}.')
        _check_timeout(timeout)
        _check_threads(reader, options)
        if find_spec(PACKAGES[reader]) is None:
            raise ImportError(_remedy(reader))
        self.reader = reader
        self.min_frames = min_frames
        self.timeout = timeout
        self.options = options
        self.open = OPENERS[reader](**options)

    def transform(self, results: dict) -> dict:
        """Add ``video_reader``, ``reader``, ``total_frames`` and ``avg_fps`` to a sample with a ``filename``."""
        path = results['filename']
        if not os.path.splitext(path)[1] and not os.path.isfile(path):
            path = f'{path}.mp4'
        with _naming(path):
            results = _within(self.timeout, 'opening', self.open.transform, {**results, 'filename': path})
            if not results['total_frames']:
                raise DamagedError('it has no frames')
        if results['total_frames'] < self.min_frames:
            raise BadFileError(
                f'filename must name a video of at least {self.min_frames} frames, as many as are sampled, '
                f'got {results["total_frames"]} in {path}. Sample fewer (clip_len), or take it out of the list.'
            )
        return results | dict(reader=self.reader)

    def __repr__(self) -> str:
        """Name and options."""
        return _call(self, reader=self.reader, min_frames=self.min_frames, timeout=self.timeout, **self.options)


@TRANSFORMS.register_module()
class DecodeClip(BaseTransform):
    """Decodes the sampled frames of a clip that :class:`OpenClip` opened, as RGB.

    Args:
        timeout: Seconds, after which decoding counts as failed. On some files decord 0.6.0 never ends.
        multi_thread: Whether PyAV may use several threads; decord's number is an option of :class:`OpenClip`.

    Raises:
        ValueError: If an argument is out of range; for a clip, if one of the frames cannot be decoded.
    """

    def __init__(self, timeout: float = 120.0, multi_thread: bool = False):
        _check_timeout(timeout)
        self.timeout = timeout
        if not isinstance(multi_thread, bool):
            raise ValueError(f'multi_thread must be True or False, got {multi_thread!r}.')
        self.multi_thread = multi_thread
        self.decoders = dict(decord=DecordDecode(), pyav=StrictPyAVDecode(multi_thread=multi_thread))

    def transform(self, results: dict) -> dict:
        """Add ``imgs``, (H, W, 3) arrays in 8 bits, ``img_shape`` and ``original_shape``."""
        if results.get('reader') not in self.decoders:
            raise ValueError('pipeline must open a clip with mmdyt.OpenClip before mmdyt.DecodeClip, got one without.')
        if not np.size(results.get('frame_inds', ())):
            raise ValueError(
                'pipeline must sample frames between mmdyt.OpenClip and mmdyt.DecodeClip, got none (frame_inds). '
                'Put SampleFrames or UniformSample there.'
            )
        with _naming(results['filename']):
            return _within(self.timeout, 'decoding', self.decoders[results['reader']].transform, results)

    def __repr__(self) -> str:
        """Name and options."""
        return _call(self, timeout=self.timeout, multi_thread=self.multi_thread)


def _check_timeout(timeout: float) -> None:
    """Refuse what threads cannot wait for."""
    number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not (number and 0 < timeout <= TIMEOUT_MAX):
        raise ValueError(f'timeout must be a positive, finite number of seconds, got {timeout!r}.')


def _check_threads(reader: str, options: dict) -> None:
    """Refuse a number of threads that the reader cannot have."""
    if 'num_threads' not in options:
        return
    num_threads = options['num_threads']
    if reader == 'pyav':
        raise ValueError(
            f"num_threads must be left out with reader='pyav', got {num_threads!r}. "
            'Set multi_thread=True of mmdyt.DecodeClip to let PyAV use several.'
        )
    if isinstance(num_threads, bool) or not (isinstance(num_threads, int) and num_threads >= 0):
        raise ValueError(f'num_threads must be an integer of at least 0 (as many as cores), got {num_threads!r}.')


def _call(transform: BaseTransform, **options) -> str:
    """A transform as it is written in code."""
    return f'{type(transform).__name__}({", ".join(f"{name}={value!r}" for name, value in options.items())})'


def _remedy(reader: str) -> str:
    """How to get a reader."""
    if reader == 'pyav':
        return 'reader must be installed, got none for pyav. Run `pip install av`.'
    return (
        'reader must be installed, got none for decord. Run `pip install decord`, or where it has no wheel (it has for '
        "x86-64 Linux and Windows) `pip install av`, and set reader='pyav'."
    )


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Turn any error about a clip into one that names its file and what is wrong with it."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise BadFileError(
            f'filename must name a sound video, got {path}: {_reason(error)}. '
            'Replace the file, or take it out of the list.'
        ) from error


def _reason(error: Exception) -> str:
    """What is wrong with a file."""
    if isinstance(error, DamagedError):
        return str(error)
    if isinstance(error, FileNotFoundError | IsADirectoryError):
        return 'there is no such file'
    for said, meaning in MEANINGS.items():
        if said in str(error):
            return meaning
    # without the time and the place in decord's source
    words = re.sub(r'\[\d\d:\d\d:\d\d\] \S+ ', '', str(error)).split('\n')[0][:150]
    return f'it is no video, or damaged ({type(error).__name__}: {words.rstrip(". ")})'


def _within(seconds: float, work: str, function, *args):
    """What a function gives; if it takes longer, an error, and its thread, stuck in native code, is left to itself."""
    future = futures.Future()

    def run():
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    if not futures.wait([future], seconds).done:
        raise DamagedError(f'{work} it did not end within {seconds:g} s')
    return future.result()
