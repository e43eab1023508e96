"""A bad file of a data set is an error that names it, and what is hidden is no part of a data set.

The hosts leave both to decoders and to chance: a decoder sees bytes, never a name ("(-215) !buf.empty()"), some fill
what is missing of a picture with grey, and a mask that lies otherwise than its image is trained on as it is.
"""

import importlib
import os
from functools import wraps
from importlib.util import find_spec
from pathlib import Path

from mmdyt.files import BadFileError

# what a sample says of its file, and what that is
FILES = dict(seg_map_path='mask', img_path='image', filename='file', frame_dir='frame', audio_path='file')
EXIF_ORIENTATION = 0x0112
PERMUTED = range(5, 9)  # orientations that swap height and width
CUT = 'it is cut short'


def install() -> None:
    """Let mmcv and mmengine name bad files and pass over hidden folders, in this process and those that it forks.

    Calling it again changes nothing.
    """
    if find_spec('mmcv') is None or find_spec('mmengine') is None:
        return
    base = importlib.import_module('mmcv.transforms').BaseTransform
    io = importlib.import_module('mmcv.image.io')
    backend = importlib.import_module('mmengine.fileio.backends').LocalBackend
    if not hasattr(base.__call__, 'names_files'):
        base.__call__ = _naming(base.__call__)
        backend.list_dir_or_file = _without_hidden(backend.list_dir_or_file)
        whole = _whole_only(io.imfrombytes, io)
        for module in ('mmcv', 'mmcv.image', 'mmcv.image.io'):
            importlib.import_module(module).imfrombytes = whole


def exif_orientation(path: str) -> int:
    """How an image is to be turned for display, by its EXIF tag; 1 is not at all."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.getexif().get(EXIF_ORIENTATION, 1)
    except OSError:
        return 1


def is_cut_jpeg(content: bytes) -> bool:
    """Whether a JPEG lacks the marker of its end, which no thumbnail within it stands for."""
    if content[:2] != b'\xff\xd8':
        return False
    at = 2
    while at + 4 <= len(content):
        mark, kind = content[at], content[at + 1]
        if mark != 0xFF:
            return False  # not as the standard has it: the decoder's business
        if kind == 0xDA:  # the picture itself, in which every 0xff of data is followed by 0
            return bytes(content[at:]).rfind(b'\xff\xd9') < 0
        if kind == 0xFF:
            at += 1  # padding
        else:
            at += 2 if kind == 0x01 or 0xD0 <= kind <= 0xD8 else 2 + int.from_bytes(content[at + 2 : at + 4], 'big')
    return True


def _naming(call):
    """Wrap the call of all transforms."""

    @wraps(call)
    def named(self, results):
        if type(self).__name__ == 'PackSegInputs':
            _check_channels(results)
        try:
            found = call(self, results)
        except (ImportError, MemoryError):
            raise
        except Exception as error:
            key = _key(self, results)
            if key is None or _says(self, error, str(results[key])):
                raise
            raise BadFileError(_sentence(self, results, key, error)) from error
        if _reads_masks(self) and isinstance(found, dict):
            _check_size(self, found)
        return found

    named.names_files = True
    return named


def _says(transform, error: Exception, path: str) -> bool:
    """Whether an error says all that there is to say; failed assertions name a file at most."""
    own = type(transform).__module__.startswith('mmdyt.')
    return own or (path in str(error) and not isinstance(error, AssertionError | FileNotFoundError))


def _reads_masks(transform) -> bool:
    """Whether a transform is mmcv's loader of annotations, or mmseg's, and reads masks."""
    return isinstance(transform, importlib.import_module('mmcv.transforms').LoadAnnotations) and transform.with_seg


def _key(transform, results: dict) -> str | None:
    """Under which key a sample names the file that a transform failed on."""
    keys = list(FILES)[0 if _reads_masks(transform) else 1 :]
    return next((k for k in keys if isinstance(results, dict) and isinstance(results.get(k), str | Path)), None)


def _sentence(transform, results: dict, key: str, error: Exception) -> str:
    """What is wrong with a sample that a transform failed on."""
    path, name = str(results[key]), type(transform).__name__
    said = f'{type(error).__name__}: {" ".join(str(error).split()).rstrip(".")}'
    if key == 'frame_dir':
        path = _bad_frame(results) or path
    # what reads other files is known by its name
    reason = _reason(path) if FILES[key] != 'file' else said if name.endswith(('Init', 'Decode')) else ''
    if not reason:
        return f'pipeline must fit every sample, got one that {name} fails on, {path}: {said}.'
    return f'{key} must name a sound {FILES[key]}, got {path}: {reason}. Replace the file, or take it out of the list.'


def _reason(path: str) -> str:
    """What is wrong with an image; nothing where it is found to be sound, or lies elsewhere than on disk."""
    from PIL import Image, UnidentifiedImageError

    if not os.path.isfile(path):
        return '' if '://' in path or os.path.isdir(path) else 'there is no such file'
    if not os.path.getsize(path):
        return 'it is empty'
    if is_cut_jpeg(Path(path).read_bytes()):
        return CUT
    try:
        with Image.open(path) as image:
            image.load()
    except UnidentifiedImageError:
        return 'it is no image'
    except Exception as error:  # Pillow raises nearly anything
        return CUT if 'truncated' in str(error) else f'it is damaged ({error})'
    return ''


def _bad_frame(results: dict) -> str:
    """The first frame of a clip that is no image."""
    offset, name = results.get('offset', 0), results.get('filename_tmpl', '')
    for index in results['frame_inds'].ravel() if 'frame_inds' in results else ():
        numbers = [('x', index + offset), ('y', index + offset)] if results.get('modality') == 'Flow' else None
        for number in numbers or [(index + offset,)]:
            path = os.path.join(results['frame_dir'], name.format(*number))
            if _reason(path):
                return path
    return ''


def _check_size(transform, results: dict) -> None:
    """Refuse a mask of another size than its image.

    Raises:
        ValueError: Naming the mask, and whether its image is the one of the two that is turned.
    """
    mask, image = results['gt_seg_map'].shape[:2], tuple(results.get('ori_shape', ()))[:2]
    if len(image) < 2 or mask == image or not _is_stock(transform):
        return
    path, image_path = results.get('seg_map_path'), str(results.get('img_path'))
    remedy = ''
    if mask == image[::-1] and exif_orientation(image_path) in PERMUTED:
        remedy = (
            ' The image is turned by its EXIF orientation, the mask is not: set '
            "color_type='color_ignore_orientation' of LoadImageFromFile, or turn the mask."
        )
    raise BadFileError(
        f'seg_map_path must name a mask as large as its image, {_size(image)} in {image_path}, '
        f'got {_size(mask)} in {path}.{remedy}'
    )


def _check_channels(results: dict) -> None:
    """Refuse a mask of colours, which mmseg packs with no more than a warning.

    Not where it is loaded: a transform of the user's own may turn colours into classes after that.

    Raises:
        ValueError: Naming the mask.
    """
    mask, image = results.get('gt_seg_map'), results.get('img')
    if getattr(mask, 'ndim', 2) == 3 and mask.shape[-1] <= 4 and getattr(image, 'ndim', 4) <= 3:
        raise many_channels(results.get('seg_map_path'), mask)


def many_channels(path: str | None, mask) -> BadFileError:
    """What is wrong with a mask of several channels."""
    return BadFileError(
        f'seg_map_path must name a mask of one channel, got {mask.shape[-1]} in {path}. '
        'Save the index of the class at every pixel, as a grey image or one with a palette.'
    )


def _is_stock(transform) -> bool:
    """Whether masks are read as mmcv or mmseg reads them."""
    return type(transform)._load_seg_map.__module__.partition('.')[0] in ('mmcv', 'mmseg')


def _size(shape: tuple[int, int]) -> str:
    return f'{shape[1]} x {shape[0]}'


def _whole_only(decode, io):
    """Wrap mmcv's decoding: OpenCV before 5 and libjpeg-turbo give the rest of a JPEG that is cut short in grey."""

    @wraps(decode)
    def whole(content, flag='color', channel_order='bgr', backend=None):
        if (backend or io.imread_backend) in ('cv2', 'turbojpeg') and is_cut_jpeg(content):
            raise OSError(CUT)
        return decode(content, flag, channel_order, backend)

    return whole


def _without_hidden(listing):
    """Wrap the listing of folders, which passes over hidden files, but not over hidden folders.

    ``.ipynb_checkpoints`` beside the class folders would be a class, and copies of images in it samples.
    """

    @wraps(listing)
    def visible(self, dir_path, *args, **options):
        found = listing(self, dir_path, *args, **options)
        return (path for path in found if not any(part.startswith('.') for part in path.split(os.sep)))

    return visible
