"""How the bridge between degrees of token merging is trained; knows no host."""

import torch
from torch import Tensor

from mmdyt.core.losses import distillation_loss
from mmdyt.core.part import parts
from mmdyt.parts.bridge import compensators, set_degree
from mmdyt.parts.token_compensator import GROUPS
from mmdyt.parts.tome import ToMe


class BridgeTraining:
    """Mixin that trains the bridge of a host model, and nothing else, on images without labels. List it first.

    Each step draws two degrees a and b of 0 to 16. The teacher is the frozen network at degree a; the student is the
    same one at degree b, with the bridge from a to b. The loss is the divergence of the student's class scores from the
    teacher's, the mean over images and classes. All but the bridge is in eval mode: no drop path, no dropout.

    Source: Token Compensator (arXiv 2408.06798).  # paper silent: the mode of the frozen network.

    Args:
        **host: Arguments of the host model.

    Raises:
        ValueError: If the backbone has no bridge, one from a file, or parts beside it and its merging.
    """

    def __init__(self, **host):
        super().__init__(**host)
        bridge = compensators(self)
        if not bridge:
            raise ValueError('parts must hold a mmdyt.TokenCompensator for a bridge to be trained, got none.')
        if bridge[0].checkpoint is not None:
            raise ValueError(f'checkpoint must be None for a bridge to be trained, got {bridge[0].checkpoint}.')
        for part in parts(self):
            if not (part in bridge or isinstance(part, ToMe)):
                raise ValueError(
                    f'parts must be ToMe and TokenCompensator only for a bridge to be trained, got a '
                    f'{type(part).__name__}. The bridge is that of the network without what tasks add.'
                )
        self.requires_grad_(False)
        for part in bridge:
            part.requires_grad_(True)

    def train(self, mode: bool = True):
        """Set the mode; the frozen network is always in that of inference."""
        super().train(False)
        for part in compensators(self):
            part.train(mode)
        self.training = mode
        return self

    def loss(self, inputs, data_samples=None, **kwargs) -> dict:
        """Of one pair of degrees that is drawn; ``divergence``, the sum over classes, is for the log."""
        tuned_at, run_at = torch.randperm(GROUPS + 1)[:2].tolist()
        divergence, classes = self.divergence(inputs, tuned_at, run_at)
        return dict(loss_bridge=divergence / classes, divergence=divergence.detach())

    def divergence(self, inputs: Tensor, tuned_at: int, run_at: int) -> tuple[Tensor, int]:
        """Of degree b with the bridge from degree a without, the mean over images, and the number of classes.

        The model is left at the degree that it had.
        """
        before = compensators(self)[0].run_at
        try:
            set_degree(self, tuned_at, tuned_at)
            with torch.no_grad():
                teacher = super().forward(inputs, mode='tensor')
            set_degree(self, run_at, tuned_at)
            student = super().forward(inputs, mode='tensor')
        finally:
            set_degree(self, before, before)
        return distillation_loss(student, teacher), student.shape[1]
