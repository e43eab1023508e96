"""A backbone as it once was, all tokens there and active, as the teacher of what it becomes. L levels of features."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn
from torch import Tensor
from torch.func import functional_call

from .levels import inactive_weights
from .observe import complete_model, eval_mode, unreduced


class FeatureTeacher:
    """The complete model of an earlier moment; it keeps the tuned parameters only, the frozen ones are shared.

    Features tell more of an image than its label, which a model with few training images soon knows by heart: a
    dispatched model that is held to them learns to do without the tokens that skip.  # differs from paper: opt-in; the
    paper distils logits, from the complete model as it is.

    Args:
        backbone: The teacher is what it is now.
        weight: Of :func:`feature_loss`, > 0.
        tensors: Tuned parameters by name, from an earlier teacher of the same backbone, instead of those of now.
        inactive_weight: >= 0; how much more cells count that skipped: see
            :func:`~mmdyt.core.levels.inactive_weights`. 0 counts all alike. For features that are maps.
            # differs from paper: opt-in.

    Raises:
        ValueError: If ``tensors`` are not those of the tuned parameters.
    """

    def __init__(
        self,
        backbone: nn.Module,
        weight: float,
        tensors: Mapping[str, Tensor] | None = None,
        inactive_weight: float = 0.0,
    ):
        tuned = {name: parameter for name, parameter in backbone.named_parameters() if parameter.requires_grad}
        if tensors is None:
            tensors = tuned
        elif {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in tuned.items()}:
            raise ValueError(f'tensors must be the {len(tuned)} tuned parameters of the backbone, got {len(tensors)}.')
        self.weight = weight
        self.inactive_weight = inactive_weight
        self.tensors = {name: tensors[name].detach().to(parameter, copy=True) for name, parameter in tuned.items()}

    @torch.no_grad()
    def features(self, backbone: nn.Module, *args: Tensor) -> Sequence[Tensor]:
        """What the teacher gives for an input of ``backbone``: in eval mode, all tokens there, running every branch."""
        with complete_model(backbone), unreduced(backbone), eval_mode(backbone):
            return functional_call(backbone, self.tensors, args)

    def loss(
        self,
        backbone: nn.Module,
        args: Sequence[Tensor],
        features: Sequence[Tensor],
        masks: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The weighted loss of the features that ``backbone`` gave for ``args``.

        Args:
            backbone: It.
            args: What it was given.
            features: What it gave.
            masks: Active share of each cell of each level, from :func:`~mmdyt.core.levels.level_masks`; read where
                there is an ``inactive_weight``.
        """
        weights = [inactive_weights(mask, self.inactive_weight) for mask in masks] if self.inactive_weight else None
        return self.weight * feature_loss(features, self.features(backbone, *args), weights)


def feature_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Sequence[Tensor] | None = None
) -> Tensor:
    """Squared distance of features in units of the teacher's squared norm, the mean over levels. In fp32.

    Args:
        student: L tensors of any shape.
        teacher: L tensors of the same shapes; no gradient flows into them.
        weights: Of the squared distances of each level, of shapes that expand to these; None is 1.
    """
    weights = [1.0] * len(student) if weights is None else weights
    triples = zip(student, teacher, weights, strict=True)
    triples = [(s.float(), t.detach().float(), w) for s, t, w in triples]
    return torch.stack([(w * (s - t).square()).sum() / t.square().sum() for s, t, w in triples]).mean()
