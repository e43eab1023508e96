"""What Dynamic Tuning adds to the training of any host model; knows no host."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdyt.core.branch import complete_model, dynamic_branches, record_dispatch
from mmdyt.core.losses import activation_rate, check_rate, distillation_loss, rate_loss
from mmdyt.core.teacher import FeatureTeacher


class DynamicModel:
    """Mixin that adds the losses of Dynamic Tuning to a host model's ``loss``. List it before the host class.

    The host's losses, plus ``rate_weight`` times the rate loss, plus ``complete_weight`` times the host's losses of the
    complete model (every token runs every branch), plus ``distill_weight`` times the KL divergence of the dynamic
    prediction from the complete one. The last two share one second forward pass, and there is none if both weights
    are 0; it leaves the running statistics of batch norms alone. A model without dispatchers has the host's losses
    only. Source: Dynamic Tuning (arXiv 2403.11808), section 3.4.

    A host class defines :meth:`logits_module`.

    Args:
        target_rate: Wanted fraction of active patch tokens, in (0, 1]: the ``r`` of the paper.
        rate_weight: Weight of the rate loss, >= 0; the paper uses 2.
        complete_weight: Weight of the complete model's losses, >= 0; the paper uses 1 for images and video.
        distill_weight: Weight of the distillation loss, >= 0; the paper uses 1 for images and video.
        **host: Arguments of the host model.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        *,
        target_rate: float = 0.5,
        rate_weight: float = 2.0,
        complete_weight: float = 0.0,
        distill_weight: float = 0.0,
        **host,
    ):
        check_rate(target_rate)
        weights = dict(rate_weight=rate_weight, complete_weight=complete_weight, distill_weight=distill_weight)
        for name, weight in weights.items():
            if not (isinstance(weight, int | float) and 0 <= weight < math.inf):
                raise ValueError(f'{name} must be at least 0, got {weight}.')
        super().__init__(**host)
        for name, branch in dynamic_branches(self).items():
            fixed = getattr(branch.dispatcher, 'rate', target_rate)
            if fixed != target_rate:
                raise ValueError(f'target_rate must be the rate {fixed} of {name}.dispatcher, got {target_rate}.')
        self.target_rate = target_rate
        self.rate_weight = rate_weight
        self.complete_weight = complete_weight
        self.distill_weight = distill_weight
        self.teacher: FeatureTeacher | None = None  # set by mmdyt.EvidenceHook

    def logits_module(self) -> nn.Module:
        """The module whose output in a training pass is the prediction that is distilled, (B, K) or (B, K, H, W)."""
        raise NotImplementedError

    def loss(self, inputs, data_samples, **kwargs) -> dict:
        """The host's losses and those of Dynamic Tuning; ``activation_rate`` of the sampled masks is for the log."""
        if not dynamic_branches(self):
            return super().loss(inputs, data_samples, **kwargs)
        with record_dispatch(self) as record, self._backbone_passes() as passes:
            logits, losses = self._host_pass(inputs, data_samples, **kwargs)
        if self.teacher is not None:
            terms = [self.teacher.loss(self.backbone, args, features) for args, features in passes]
            losses['loss_features'] = sum(terms) / len(terms)
        rate = activation_rate(record.flat())
        losses['loss_rate'] = self.rate_weight * rate_loss(rate, self.target_rate)
        losses['activation_rate'] = rate.detach()
        if self.complete_weight or self.distill_weight:
            # a teacher that is not itself trained needs no gradient
            learns = self.complete_weight > 0 and torch.is_grad_enabled()
            with complete_model(self), _kept_statistics(self), torch.set_grad_enabled(learns):
                teacher, complete = self._host_pass(inputs, data_samples, **kwargs)
            if self.complete_weight:
                losses |= {f'complete.{k}': _weighted(k, value, self.complete_weight) for k, value in complete.items()}
            if self.distill_weight:
                losses['loss_distill'] = self.distill_weight * distillation_loss(logits, teacher)
        return losses

    @contextmanager
    def _backbone_passes(self) -> Iterator[list[tuple[tuple, tuple]]]:
        """Yields a list to which each pass of the backbone within the context adds its inputs and its features."""
        passes: list[tuple[tuple, tuple]] = []
        handle = self.backbone.register_forward_hook(lambda module, args, output: passes.append((args, output)))
        try:
            yield passes
        finally:
            handle.remove()

    def _host_pass(self, inputs, data_samples, **kwargs) -> tuple[Tensor | None, dict]:
        """One forward pass of the host: the prediction, where it will be distilled, and the host's losses."""
        if not self.distill_weight:
            return None, super().loss(inputs, data_samples, **kwargs)
        outputs = []
        module = self.logits_module()
        handle = module.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            losses = super().loss(inputs, data_samples, **kwargs)
        finally:
            handle.remove()
        if not outputs:
            raise ValueError(
                f'distill_weight must be 0 with a {type(module).__name__}, whose training pass shows no logits, got '
                f'{self.distill_weight}.'
            )
        return outputs[-1], losses


@contextmanager
def _kept_statistics(model: nn.Module) -> Iterator[None]:
    """Within the context batch norms (of heads) normalise as ever, but do not update their running statistics.

    Inference normalises what the dynamic model gives; the complete model's features must not be mixed in.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    before = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum


def _weighted(name: str, value: Tensor | list[Tensor], weight: float) -> Tensor | list[Tensor]:
    """A loss times its weight; what is not a loss (an accuracy) as it is."""
    if 'loss' not in name:
        return value
    return [weight * v for v in value] if isinstance(value, list) else weight * value
