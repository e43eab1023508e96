"""Dynamic Tuning in mmaction2. B samples of M views (clips of T frames each), V = B x M."""

from inspect import signature

import torch
from mmaction.models import Recognizer3D
from torch import Tensor, nn

from mmdyt.models.clip_neck import ClipNeck
from mmdyt.models.dynamic_model import DynamicModel
from mmdyt.registry import MODELS

__all__ = ['ClipNeck', 'DyTRecognizer']


def _single_precision(head: nn.Module, args: tuple, scores: Tensor) -> Tensor:
    """mmaction2's heads hand scores to NumPy, which knows no bfloat16."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


@MODELS.register_module()
class DyTRecognizer(DynamicModel, Recognizer3D):
    """mmaction2's ``Recognizer3D`` trained with Dynamic Tuning (DyT): cross-entropy of the dynamic and of the complete
    model, distillation of the latter into the former, and the rate loss.

    The backbone is an image model, ``mmdyt.DyTVisionTransformer``: it runs frame by frame, frames folded into the
    batch. The defaults are the paper's losses. mmaction2's necks, heads that read clips, data preprocessors, views and
    ``average_clips`` work unchanged; ``test_cfg.max_testing_views`` also with several samples a batch.

    Args:
        complete_weight: See :class:`~mmdyt.models.dynamic_model.DynamicModel`.
        distill_weight: See there.
        **host: Its other arguments, and those of mmaction2's ``Recognizer3D``.

    Shape:
        Inputs (B, M, C, T, H, W), as ``FormatShape(input_format='NCTHW')`` packs them.

    Raises:
        ValueError: If an argument is out of range, the head is missing or one of 2D recognizers, or its classes do not
            exclude each other.
    """

    def __init__(self, *, complete_weight: float = 1.0, distill_weight: float = 1.0, **host):
        super().__init__(complete_weight=complete_weight, distill_weight=distill_weight, **host)
        self._check_head()
        self.cls_head.register_forward_hook(_single_precision)
        levels = getattr(self.backbone, 'out_indices', [None])
        if len(levels) != 1:
            raise ValueError(f'out_indices must name one layer of the backbone for a recognizer, got {list(levels)}.')
        shape = getattr(self.data_preprocessor, 'format_shape', 'NCTHW')
        if shape != 'NCTHW':
            raise ValueError(f"format_shape must be 'NCTHW' in data_preprocessor, got {shape!r}. Clips are packed so.")
        if distill_weight and getattr(self.cls_head, 'multi_class', False):
            raise ValueError(
                f'distill_weight must be 0 with a head of multi_class=True, got {distill_weight}. The distillation is '
                'between classes that exclude each other.'
            )
        self.check_classes()
        test_cfg = self.test_cfg or {}
        if test_cfg.get('fcn_test'):
            raise ValueError(f'fcn_test must be False in test_cfg, got {test_cfg["fcn_test"]}. ViTs have no such test.')
        views = test_cfg.get('max_testing_views')
        if not (views is None or isinstance(views, int) and not isinstance(views, bool) and views >= 1):
            raise ValueError(f'max_testing_views must be a positive integer in test_cfg, got {views!r}.')

    def _check_head(self) -> None:
        """Refuse what cannot read the features of a clip."""
        if not self.with_cls_head:
            raise ValueError('cls_head must be a head of mmaction2, got none.')
        wanted = signature(self.cls_head.forward).parameters.get('num_segs')
        if wanted is not None and wanted.default is wanted.empty:
            raise ValueError(
                f'cls_head must be a head of 3D recognizers, got {type(self.cls_head).__name__}, which wants num_segs.'
            )

    def logits_module(self) -> nn.Module:
        """The head: its output are the class scores."""
        return self.cls_head

    def extract_feat(
        self, inputs: Tensor, stage: str = 'neck', data_samples: list | None = None, test_mode: bool = False
    ) -> tuple:
        """Features of all views, and arguments of the head, as in mmaction2's recognizers.

        Args:
            inputs: (B, M, C, T, H, W).
            stage: What to return: output of ``'backbone'``, ``'neck'`` or ``'head'``.
            data_samples: Of the batch, for necks with losses.
            test_mode: Whether views run ``test_cfg.max_testing_views`` at a time, to save memory.

        Raises:
            ValueError: If the inputs are no clips.
        """
        if inputs.dim() != 6:
            raise ValueError(
                f"inputs must be clips (B, views, C, T, H, W), got shape {tuple(inputs.shape)}. Set the pipeline's "
                "FormatShape to input_format='NCTHW'."
            )
        views = inputs.flatten(0, 1)
        at_once = (self.test_cfg or {}).get('max_testing_views') if test_mode else None
        features, losses = zip(
            *(self._view_features(part, stage, data_samples) for part in views.split(at_once or len(views))),
            strict=True,
        )
        features = torch.cat(features)
        if stage == 'head':
            features = self.cls_head(features)
        # in tests there are no losses, and in training there is one part
        return features, dict(fcn_test=False) if test_mode else dict(loss_aux=losses[0])

    def _view_features(self, views: Tensor, stage: str, data_samples: list | None) -> tuple[Tensor, dict]:
        """What the backbone, and after it the neck, say of clips (V, C, T, H, W), and the neck's losses."""
        (features,) = self.backbone(views)
        if stage == 'backbone' or not self.with_neck:
            return features, {}
        return self.neck(features, data_samples=data_samples)
