"""A hook that does alike at validation and at test."""

from mmengine.hooks import Hook


class EvaluationHook(Hook):
    """Hears of validation and test by the same three methods, which are told which of the two it is."""

    def begin(self, runner, mode: str) -> None:
        """Before an evaluation.

        Args:
            runner: mmengine's.
            mode: ``'val'`` or ``'test'``.
        """

    def see(self, runner, batch_idx: int, data_batch, outputs) -> None:
        """After a batch of it; the arguments are those of mmengine's ``after_val_iter``."""

    def finish(self, runner, metrics: dict | None, mode: str) -> None:
        """After it.

        Args:
            runner: mmengine's.
            metrics: What was measured, to be added to; None where nothing was.
            mode: As of :meth:`begin`.
        """

    def publish(self, runner, report: dict[str, float], metrics: dict | None, mode: str) -> None:
        """Give what was found to the message hub, and so to the log and the back ends, and to the metrics."""
        for name, value in report.items():
            runner.message_hub.update_scalar(f'{mode}/{name}', value)
        if metrics is not None:
            metrics.update(report)

    def before_val_epoch(self, runner) -> None:
        """See :meth:`begin`."""
        self.begin(runner, 'val')

    def before_test_epoch(self, runner) -> None:
        """See :meth:`begin`."""
        self.begin(runner, 'test')

    def after_val_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """See :meth:`see`."""
        self.see(runner, batch_idx, data_batch, outputs)

    def after_test_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """See :meth:`see`."""
        self.see(runner, batch_idx, data_batch, outputs)

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        """See :meth:`finish`."""
        self.finish(runner, metrics, 'val')

    def after_test_epoch(self, runner, metrics: dict | None = None) -> None:
        """See :meth:`finish`."""
        self.finish(runner, metrics, 'test')
