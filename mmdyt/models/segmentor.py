"""Dynamic Tuning in mmsegmentation."""

from mmseg.models import EncoderDecoder

from mmdyt.models.dynamic_model import DynamicModel
from mmdyt.registry import MODELS


@MODELS.register_module()
class DyTEncoderDecoder(DynamicModel, EncoderDecoder):
    """mmseg's ``EncoderDecoder`` trained with Dynamic Tuning (DyT): its losses plus the rate loss.

    Stock heads, necks, whole and slide inference and test-time augmentation work unchanged. The paper's segmentation
    recipe is cross-entropy, 0.4 x auxiliary cross-entropy (both from the heads' configs) and 2.0 x rate loss.

    Args:
        target_rate: See :class:`~mmdyt.models.dynamic_model.DynamicModel`.
        rate_weight: See there.
        **host: Arguments of mmseg's ``EncoderDecoder``.
    """
