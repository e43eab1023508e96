"""What Dynamic Tuning adds to the training of any host model; knows no host."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from mmdyt.core.losses import check_rate
from mmdyt.core.observe import dynamic_branches
from mmdyt.core.options import is_number
from mmdyt.core.padding import showing
from mmdyt.core.teacher import FeatureTeacher
from mmdyt.core.views import views_of
from mmdyt.models.loss_terms import TERMS, Passes, feature_term


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
            if not (is_number(weight) and weight >= 0):
                raise ValueError(f'{name} must be at least 0, got {weight!r}.')
        super().__init__(**host)
        for name, branch in dynamic_branches(self).items():
            fixed = branch.dispatcher.rate
            if fixed not in (None, target_rate):
                raise ValueError(f'target_rate must be the rate {fixed} of {name}.dispatcher, got {target_rate}.')
        self.target_rate = target_rate
        self.rate_weight = rate_weight
        self.complete_weight = complete_weight
        self.distill_weight = distill_weight
        self.teacher: FeatureTeacher | None = None
        self.terms = TERMS

    def logits_module(self) -> nn.Module:
        """The module whose output in a training pass is the prediction that is distilled, (B, K) or (B, K, H, W)."""
        raise TypeError(f'{type(self).__name__} must say which module gives its logits.')

    def check_classes(self) -> None:
        """Refuse to distil a head of one class; hosts call it when they have theirs.

        Raises:
            ValueError: If it has.
        """
        if not self.distill_weight:
            return
        module = self.logits_module()
        classes = getattr(module, 'out_channels', getattr(module, 'num_classes', None))
        if classes == 1:
            raise ValueError(
                f'distill_weight must be 0 with one class, whose probability is always 1, got {self.distill_weight} '
                f'with a {type(module).__name__} of one output.'
            )

    def set_teacher(self, teacher: FeatureTeacher | None) -> None:
        """Hold the backbone's features to those of an earlier moment from now on; None no longer does."""
        self.teacher = teacher

    @contextmanager
    def host_losses(self) -> Iterator[None]:
        """Within the context the losses are the host's own."""
        before, self.terms = self.terms, ()
        try:
            yield
        finally:
            self.terms = before

    def forward(self, inputs, data_samples=None, mode: str = 'tensor', **kwargs):
        """The host's; meanwhile the backbone knows what is padding."""
        views = views_of(self, inputs, data_samples, mode)
        if views is None:  # a compiled model must not change a context
            return super().forward(inputs, data_samples, mode, **kwargs)
        with showing(views):
            return super().forward(inputs, data_samples, mode, **kwargs)

    def loss(self, inputs, data_samples, **kwargs) -> dict:
        """The host's losses and those of Dynamic Tuning; ``activation_rate`` of the sampled masks is for the log."""
        dispatched = bool(dynamic_branches(self))
        if not (dispatched or self.teacher):
            return super().loss(inputs, data_samples, **kwargs)
        passes = Passes(self, partial(self._host_pass, inputs, data_samples, **kwargs))
        losses = passes.dynamic.losses
        for term in self.terms:
            if dispatched or term is feature_term:
                losses |= term(self, passes)
        return losses

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
