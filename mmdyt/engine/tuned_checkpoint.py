"""Checkpoints of what is tuned alone."""

from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.model import is_model_wrapper
from mmengine.runner import FlexibleRunner

from mmdyt.registry import HOOKS
from mmdyt.tuned.file import SUFFIX
from mmdyt.tuned.model import tuned_only


@HOOKS.register_module()
class TunedCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, which writes ``.safetensors`` of what was tuned: parts, heads, norms' buffers.

    The frozen base is left out. It is known by its fingerprint and found by the ``init_cfg`` of the model, so it must
    stay there. Put the hook in the place of the stock one: ``default_hooks.checkpoint.type=mmdyt.TunedCheckpointHook``.
    Training goes on from such a file only where it holds the state of the optimizer.

    Args:
        save_optimizer: Whether files hold the state of training, about twice what is tuned.
        by_epoch: As of the stock hook.
        filename_tmpl: Name of the files; ends in ``.safetensors``.
        **options: Of the stock hook, but ``published_keys``.

    Raises:
        ValueError: If an argument is out of range; before training, with a ``FlexibleRunner``, or if a state of
            training would hold averages of all weights (``EMAHook``).
    """

    def __init__(
        self, *, save_optimizer: bool = False, by_epoch: bool = True, filename_tmpl: str | None = None, **options
    ):
        if options.get('published_keys') is not None:
            raise ValueError(
                f'published_keys must be None, got {options["published_keys"]}: files hold nothing to be taken out.'
            )
        filename_tmpl = filename_tmpl or ('epoch_{}' if by_epoch else 'iter_{}') + SUFFIX
        if not filename_tmpl.endswith(SUFFIX):
            raise ValueError(f'filename_tmpl must end in {SUFFIX}, got {filename_tmpl!r}.')
        super().__init__(by_epoch=by_epoch, save_optimizer=save_optimizer, filename_tmpl=filename_tmpl, **options)
        self._saves = False

    def before_train(self, runner) -> None:
        """Refuse what cannot be written: averages, which are as large as the model, and models in pieces."""
        if isinstance(runner, FlexibleRunner):
            raise ValueError(f'runner_type must be Runner with mmdyt.TunedCheckpointHook, got {type(runner).__name__}.')
        if self.save_optimizer and any(isinstance(hook, EMAHook) for hook in runner.hooks):
            raise ValueError('save_optimizer must be False with an EMAHook, got True.')
        super().before_train(runner)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Leave the base out of a file of this hook's own."""
        if not self._saves:
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        found = tuned_only(model, checkpoint)
        if not found['tuned']['base']['tensors']:
            runner.logger.warning('mmdyt.TunedCheckpointHook finds nothing that init_cfg gives: it writes all weights.')
        checkpoint.update(found)

    def _save_checkpoint_with_step(self, runner, step: int, meta: dict) -> None:
        with self._saving():
            super()._save_checkpoint_with_step(runner, step, meta)

    def _save_best_checkpoint(self, runner, metrics: dict) -> None:
        with self._saving():
            super()._save_best_checkpoint(runner, metrics)

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Within the context all that the runner saves is this hook's."""
        before, self._saves = self._saves, True
        try:
            yield
        finally:
            self._saves = before
