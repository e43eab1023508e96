"""Dynamic Tuning in mmpretrain."""

from mmpretrain.models import ClsDataPreprocessor, ImageClassifier
from mmpretrain.models.heads import MultiLabelClsHead
from torch import nn

from mmdyt.core.options import check_choice
from mmdyt.models.bridge_training import BridgeTraining
from mmdyt.models.dynamic_model import DynamicModel
from mmdyt.registry import MODELS


@MODELS.register_module()
class DyTImageClassifier(DynamicModel, ImageClassifier):
    """mmpretrain's ``ImageClassifier`` trained with Dynamic Tuning (DyT): cross-entropy of the dynamic and of the
    complete model, distillation of the latter into the former, and the rate loss.

    The defaults are the paper's losses. Stock necks, heads and metrics work unchanged.

    Args:
        complete_weight: See :class:`~mmdyt.models.dynamic_model.DynamicModel`.
        distill_weight: See there.
        **host: Its other arguments, and those of mmpretrain's ``ImageClassifier``.

    Raises:
        ValueError: If an argument is out of range, or the head's classes do not exclude each other.
    """

    def __init__(self, *, complete_weight: float = 1.0, distill_weight: float = 1.0, **host):
        super().__init__(complete_weight=complete_weight, distill_weight=distill_weight, **host)
        if distill_weight and isinstance(self.head, MultiLabelClsHead):
            raise ValueError(
                f'distill_weight must be 0 with a {type(self.head).__name__}, got {distill_weight}. The distillation '
                'is between classes that exclude each other.'
            )
        self.check_classes()

    def logits_module(self) -> nn.Module:
        """The head: its output are the class scores."""
        return self.head


@MODELS.register_module()
class CompensatorTrainer(BridgeTraining, DyTImageClassifier):
    """mmpretrain's ``ImageClassifier`` whose bridge between degrees of token merging is trained; its head is frozen."""


@MODELS.register_module()
class ImagePreprocessor(ClsDataPreprocessor):
    """mmpretrain's ``ClsDataPreprocessor`` with the normalisation by name, in RGB.

    Papers rarely say which one they used, and results depend on it: a name is easily switched and printed.

    Args:
        normalization: ``'half'``, mean = std = 127.5, as the ImageNet-21K ViTs of the paper were trained; or
            ``'imagenet'``, the mean and standard deviation of ImageNet.
        **options: Arguments of ``ClsDataPreprocessor``, but ``mean``, ``std`` and ``to_rgb``.

    Raises:
        ValueError: If the name is unknown.
    """

    NORMALIZATIONS = dict(
        half=dict(mean=[127.5] * 3, std=[127.5] * 3),
        imagenet=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]),
    )

    def __init__(self, normalization: str = 'half', **options):
        check_choice(self.NORMALIZATIONS, normalization=normalization)
        super().__init__(**self.NORMALIZATIONS[normalization], to_rgb=True, **options)
        self.normalization = normalization
