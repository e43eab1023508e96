"""What Dynamic Tuning adds to the training of any host model; knows no host."""

from mmdyt.core.branch import record_dispatch
from mmdyt.core.losses import activation_rate, rate_loss


class DynamicModel:
    """Mixin that adds the rate loss to a host model's ``loss``. List it before the host class.

    Source: Dynamic Tuning (arXiv 2403.11808), section 3.4.

    Args:
        target_rate: Wanted fraction of active patch tokens, in (0, 1]: the ``r`` of the paper.
        rate_weight: Weight of the rate loss, >= 0; the paper uses 2.
        **host: Arguments of the host model.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, *, target_rate: float = 0.5, rate_weight: float = 2.0, **host):
        if not (isinstance(target_rate, int | float) and 0 < target_rate <= 1):
            raise ValueError(f'target_rate must lie in (0, 1], got {target_rate}. Rates are fractions, not percent.')
        if not (isinstance(rate_weight, int | float) and rate_weight >= 0):
            raise ValueError(f'rate_weight must be at least 0, got {rate_weight}.')
        super().__init__(**host)
        self.target_rate = target_rate
        self.rate_weight = rate_weight

    def loss(self, inputs, data_samples, **kwargs) -> dict:
        """The host's losses, plus ``loss_rate`` and, for the log only, ``activation_rate`` of the sampled masks."""
        with record_dispatch(self) as record:
            losses = super().loss(inputs, data_samples, **kwargs)
        rate = activation_rate(record.flat())
        losses['loss_rate'] = self.rate_weight * rate_loss(rate, self.target_rate)
        losses['activation_rate'] = rate.detach()
        return losses
