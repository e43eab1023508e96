"""Say once, at the start, what is tuned and what is frozen."""

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from mmdyt.core.tuning import count_parameters
from mmdyt.registry import HOOKS


@HOOKS.register_module()
class ParameterReportHook(Hook):
    """Log the tuned and frozen parameters (M) before training, as counted from ``requires_grad``."""

    def before_train(self, runner) -> None:
        """Log one line."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        count = {part: number / 1e6 for part, number in count_parameters(model).items()}
        rest = count['tuned'] - count['adapter'] - count['dispatcher']
        runner.logger.info(
            f'Parameters (M): {count["tuned"]:.3f} tuned (adapters {count["adapter"]:.3f}, dispatchers '
            f'{count["dispatcher"]:.3f}, everything else {rest:.3f}), {count["frozen"]:.3f} frozen.'
        )
