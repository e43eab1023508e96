"""A backbone as it once was, all tokens active, as the teacher of what it becomes. B images, L levels of features."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn
from torch import Tensor
from torch.func import functional_call

from .observe import complete_model, eval_mode


class FeatureTeacher:
    """The complete model of an earlier moment; it keeps the tuned parameters only, the frozen ones are shared.

    Features tell more of an image than its label, which a model with few training images soon knows by heart: a
    dispatched model that is held to them learns to do without the tokens that skip.  # differs from paper: opt-in; the
    paper distils logits, from the complete model as it is.

    Args:
        backbone: The teacher is what it is now.
        weight: Of :func:`feature_loss`, > 0.
        tensors: Tuned parameters by name, from an earlier teacher of the same backbone, instead of those of now.

    Raises:
        ValueError: If ``tensors`` are not those of the tuned parameters.
    """

    def __init__(self, backbone: nn.Module, weight: float, tensors: Mapping[str, Tensor] | None = None):
        tuned = {name: parameter for name, parameter in backbone.named_parameters() if parameter.requires_grad}
        if tensors is None:
            tensors = tuned
        elif {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in tuned.items()}:
            raise ValueError(f'tensors must be the {len(tuned)} tuned parameters of the backbone, got {len(tensors)}.')
        self.weight = weight
        self.tensors = {name: tensors[name].detach().to(parameter, copy=True) for name, parameter in tuned.items()}

    @torch.no_grad()
    def features(self, backbone: nn.Module, *args: Tensor) -> Sequence[Tensor]:
        """What the teacher gives for an input of ``backbone``: in eval mode, every token running every branch."""
        with complete_model(backbone), eval_mode(backbone):
            return functional_call(backbone, self.tensors, args)

    def loss(self, backbone: nn.Module, args: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
        """The weighted loss of the features that ``backbone`` gave for ``args``."""
        return self.weight * feature_loss(features, self.features(backbone, *args))


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Squared distance of features in units of the teacher's squared norm, the mean over levels. In fp32.

    Args:
        student: L tensors of any shape.
        teacher: L tensors of the same shapes; no gradient flows into them.
    """
    pairs = [(s.float(), t.detach().float()) for s, t in zip(student, teacher, strict=True)]
    return torch.stack([(s - t).square().sum() / t.square().sum() for s, t in pairs]).mean()
