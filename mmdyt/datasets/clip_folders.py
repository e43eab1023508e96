"""Clips in lists or class folders, a share of which may be held out."""

import os

from mmaction.datasets import VideoDataset

from mmdyt.registry import DATASETS

from .files import VIDEOS, find_files
from .held_out import HeldOut


@DATASETS.register_module()
class ClipList(HeldOut, VideoDataset):
    """mmaction's ``VideoDataset`` with the ``filter_cfg`` of :class:`~mmdyt.datasets.held_out.HeldOut`."""


@DATASETS.register_module()
class ClipFolders(HeldOut, VideoDataset):
    """Clips in class folders, which mmaction does not read; labels are places in ``metainfo['classes']``.

    Args:
        **options: Those of mmaction's ``VideoDataset``; ``data_prefix['video']`` holds the class folders.

    Raises:
        ValueError: If the config names no classes.
    """

    def __init__(self, **options):
        if not (options.get('metainfo') or {}).get('classes'):
            raise ValueError('metainfo must name the classes, which are folders, got none.')
        super().__init__(**dict(options, ann_file=''))

    def load_data_list(self) -> list[dict]:
        """All clips of all classes; a class without any is none the worse."""
        found = []
        for label, name in enumerate(self.metainfo['classes']):
            folder = os.path.join(self.data_prefix['video'], name)
            there = os.path.isdir(folder) and any(
                file.lower().endswith(VIDEOS) for _, _, files in os.walk(folder) for file in files
            )
            found += [dict(filename=file, label=label) for file in (find_files([folder], video=True) if there else [])]
        return found
