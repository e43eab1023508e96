"""Images and videos without annotations, for any host's test pipeline."""

from collections.abc import Sequence
from pathlib import Path

from mmengine.dataset import BaseDataset
from mmengine.utils import scandir

from mmdyt.registry import DATASETS

IMAGES = ('.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')
VIDEOS = ('.avi', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm')


@DATASETS.register_module()
class Files(BaseDataset):
    """Files, one sample each, in the order in which they are given.

    Args:
        files: Their paths.
        video: Whether they are videos; else images.
        **options: ``pipeline``, ``metainfo`` and the like of mmengine's ``BaseDataset``.
    """

    def __init__(self, files: Sequence[str], video: bool = False, **options):
        self.files = [str(file) for file in files]
        self.video = video
        super().__init__(ann_file='', **options)

    def load_data_list(self) -> list[dict]:
        """What pipelines begin with."""
        if self.video:
            return [dict(filename=file, start_index=0, modality='RGB') for file in self.files]
        return [dict(img_path=file) for file in self.files]


def find_files(paths: Sequence[str], video: bool = False) -> list[str]:
    """The images or videos that some paths name: files, and folders with all in them that is not hidden, sorted.

    Args:
        paths: Of files and folders.
        video: Whether videos are wanted; else images.

    Raises:
        FileNotFoundError: If a path is missing, or a folder has no such file.
        ValueError: If a file is of another kind.
    """
    endings, kind, found = (VIDEOS, 'video', []) if video else (IMAGES, 'image', [])
    for path in map(Path, paths):
        if path.is_dir():
            names = scandir(path, endings, recursive=True, case_sensitive=False)
            inside = sorted(str(path / name) for name in names)
            if not inside:
                raise FileNotFoundError(f'{path} must hold a file that ends with {", ".join(endings)}, got none.')
            found += inside
        elif not path.is_file():
            raise FileNotFoundError(f'{kind} must name an existing file or folder, got {path}.')
        elif path.suffix.lower() not in endings:
            raise ValueError(f'{kind} must end with {", ".join(endings)}, got {path}.')
        else:
            found.append(str(path))
    return found
