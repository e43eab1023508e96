"""Say once, at the start, what is tuned and what is frozen."""

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from mmdyt.core.tuning import count_parameters, count_tuned_parts
from mmdyt.registry import HOOKS


@HOOKS.register_module()
class ParameterReportHook(Hook):
    """Log the tuned and frozen parameters (M) before training, as counted from ``requires_grad``."""

    def before_train(self, runner) -> None:
        """Log one line."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        count, tuned = count_parameters(model), count_tuned_parts(model)
        rest = count['tuned'] - sum(tuned.values())
        named = dict(adapters=tuned.pop('adapter'), dispatchers=tuned.pop('dispatcher')) | tuned
        listed = ', '.join(f'{word} {number / 1e6:.3f}' for word, number in named.items())
        runner.logger.info(
            f'Parameters (M): {count["tuned"] / 1e6:.3f} tuned ({listed}, everything else {rest / 1e6:.3f}), '
            f'{count["frozen"] / 1e6:.3f} frozen.'
        )
