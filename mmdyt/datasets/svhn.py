"""Street View House Numbers, which mmpretrain lacks."""

from pathlib import Path

import numpy as np
import torchvision
from mmengine import dist
from mmpretrain.datasets import BaseDataset
from torchvision.datasets.utils import download_url

from mmdyt.registry import DATASETS


@DATASETS.register_module()
class SVHN(BaseDataset):
    """`SVHN <http://ufldl.stanford.edu/housenumbers/>`_, cropped digits of 32 x 32, read by torchvision.

    Images are RGB arrays under ``img``, as in mmpretrain's ``CIFAR100``; files that mmpretrain loads are BGR.

    Args:
        data_root: Folder with ``train_32x32.mat``, ``test_32x32.mat`` or ``extra_32x32.mat``.
        split: ``'train'`` (73257 images), ``'test'`` (26032) or ``'extra'`` (531131).
        download: Whether to download the file of the split where it is missing.
        **options: Other arguments of mmpretrain's ``BaseDataset``.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If the split is unknown, or the file is not the published one.
    """

    METAINFO = dict(classes=tuple('0123456789'))

    def __init__(self, data_root: str, split: str = 'train', download: bool = False, **options):
        splits = list(torchvision.datasets.SVHN.split_list)
        if split not in splits:
            raise ValueError(f'split must be one of {splits}, got {split!r}.')
        self.split = split
        self.download = download
        super().__init__(ann_file='', data_root=data_root, **options)

    def load_data_list(self) -> list[dict]:
        """Image and label of every digit."""
        svhn = self._read()
        images = np.ascontiguousarray(svhn.data.transpose(0, 2, 3, 1))  # (N, 32, 32, 3)
        return [dict(img=image, gt_label=int(label)) for image, label in zip(images, svhn.labels, strict=True)]

    def _read(self) -> torchvision.datasets.SVHN:
        """The split as torchvision reads it, downloaded once for all ranks if that was asked for."""
        url, name, md5 = torchvision.datasets.SVHN.split_list[self.split]
        root = Path(self.data_root).expanduser()
        if self.download and dist.is_main_process():
            download_url(url, root, name, md5)
        dist.barrier()
        if not (root / name).is_file():
            raise FileNotFoundError(
                f'data_root must hold {name}, got {self.data_root} without it. Get it from {url}, or set download=True.'
            )
        try:
            return torchvision.datasets.SVHN(root, self.split)
        except RuntimeError as error:  # its md5 differs
            raise ValueError(f'{root / name} must be the file of {url}, got another or a part of it.') from error
