"""Images and masks, a share of which may be held out."""

from mmseg.datasets import BaseSegDataset

from mmdyt.registry import DATASETS

from .held_out import HeldOut


@DATASETS.register_module()
class Masks(HeldOut, BaseSegDataset):
    """mmseg's ``BaseSegDataset`` with the ``filter_cfg`` of :class:`~mmdyt.datasets.held_out.HeldOut`."""
