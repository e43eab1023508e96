"""What is tuned and what is frozen: said once at the start of a run, or counted from a config."""

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import MODELS, init_default_scope

from mmdyt.core.tuning import count_parameters, count_tuned_parts
from mmdyt.engine.shapes import shapes_only
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


def count_tuned(cfg: Config) -> dict[str, int]:
    """Trained parameters of the backbone, ``tuned``, and of all behind it, ``head``; no tensor is filled.

    Args:
        cfg: A config whose modules are imported.
    """
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    with shapes_only():
        model = MODELS.build(cfg.model)
    tuned = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    backbone = sum(number for name, number in tuned.items() if name.startswith('backbone.'))
    return dict(tuned=backbone, head=sum(tuned.values()) - backbone)
