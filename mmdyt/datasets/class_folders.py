"""Images in class folders, a share of which may be held out."""

from mmpretrain.datasets import CustomDataset

from mmdyt.registry import DATASETS

from .held_out import HeldOut


@DATASETS.register_module()
class ClassFolders(HeldOut, CustomDataset):
    """mmpretrain's ``CustomDataset`` with the ``filter_cfg`` of :class:`~mmdyt.datasets.held_out.HeldOut`."""
