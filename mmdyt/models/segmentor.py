"""Dynamic Tuning in mmsegmentation."""

from mmseg.models import EncoderDecoder
from torch import nn

from mmdyt.models.dynamic_model import DynamicModel
from mmdyt.registry import MODELS


@MODELS.register_module()
class DyTEncoderDecoder(DynamicModel, EncoderDecoder):
    """mmseg's ``EncoderDecoder`` trained with Dynamic Tuning (DyT): its losses plus the rate loss.

    ``complete_weight`` and ``distill_weight`` add the losses of the complete model, per pixel; the paper has them for
    images and video only.  # differs from paper: opt-in, off by default.

    Stock heads, necks, whole and slide inference and test-time augmentation work unchanged. The paper's segmentation
    recipe is cross-entropy, 0.4 x auxiliary cross-entropy (both from the heads' configs) and 2.0 x rate loss.

    Args:
        target_rate: See :class:`~mmdyt.models.dynamic_model.DynamicModel`.
        rate_weight: See there.
        complete_weight: See there.
        distill_weight: See there. For decode heads that classify pixels with ``conv_seg``, as nearly all of mmseg do.
        **host: Arguments of mmseg's ``EncoderDecoder``.

    Raises:
        ValueError: If an argument is out of range, or the decode head has no logits to distil.
    """

    def __init__(self, **host):
        super().__init__(**host)
        if self.distill_weight and not hasattr(self.decode_head, 'conv_seg'):
            raise ValueError(
                f'distill_weight must be 0 with a decode head without conv_seg, got {self.distill_weight} with '
                f'{type(self.decode_head).__name__}.'
            )
        self.check_classes()

    def logits_module(self) -> nn.Module:
        """The layer that classifies the decode head's pixels."""
        return self.decode_head.conv_seg
