"""Train with all tokens, fit which of them matter, then keep fewer and fewer."""

from functools import partial

import torch.nn as nn
from mmengine.dist import broadcast
from mmengine.hooks import EMAHook

from mmdyt.core.fit.token_evidence import fit_token_gates, gated
from mmdyt.core.observe import reductions
from mmdyt.core.part import TokenOp
from mmdyt.registry import HOOKS

from .calibration import unwrapped
from .evidence import fit_sentence, losses_of
from .stages import StagedHook, save_as_it_is, scheduled_rate


def adjustable(model: nn.Module) -> dict[str, TokenOp]:
    """The parts of a model that make tokens fewer by a keep rate, by module name, in network order."""
    return {name: one for name, one in reductions(model).items() if hasattr(one, 'set_keep_rate')}


@HOOKS.register_module()
class KeepRateHook(StagedHook):
    """Training of :class:`mmdyt.parts.sparse_tokens.SparseTokens` and its kin in three stages.

    1. Up to ``begin`` every token goes on.
    2. The gates of :class:`mmdyt.parts.evidence_tokens.EvidenceTokens` are fitted in closed form
       (:func:`mmdyt.core.fit.token_evidence.fit_token_gates`) on a few batches of training images; and from there to
       ``end`` keep rates fall in a straight line from 1 to those of the config.
    3. The rest of training runs as inference does.

    Keep rates are no part of a checkpoint: one that is saved in between is tested with those of its config. Everything
    else that a resumed run needs is in it.  # differs from paper: opt-in; Sparse-Tuning trains with the final rate.

    Args:
        begin: Where stage 1 ends, as a fraction of training, in [0, 1); at the earliest after the first step.
        end: Where stage 2 ends, in [begin, 1].
        num_batches: Batches of training images that gates are fitted on, >= 1. They stay in memory meanwhile.
        feature_weight: >= 0; from stage 2 on hold the features of the backbone to those that it gives with all tokens
            and the parameters of the end of stage 1, by this weight (:class:`mmdyt.core.teacher.FeatureTeacher`). Costs
            a forward pass without gradients in each step.

    Raises:
        ValueError: If an argument is out of range, or, before training, if the model has no keep rates, or gates and
            averaged weights (``EMAHook``).
    """

    def __init__(self, begin: float = 0.4, end: float = 0.6, num_batches: int = 8, feature_weight: float = 0.0):
        super().__init__(begin, end, num_batches, feature_weight)
        self._fitted = False
        self._wanted: dict[TokenOp, float] = {}

    def before_train(self, runner) -> None:
        """Refuse a model that cannot be trained so; remember the rates that are wanted."""
        host = unwrapped(runner.model)
        operations = adjustable(host)
        if not operations:
            raise ValueError('model must have parts with a keep_rate with mmdyt.KeepRateHook, got none.')
        if gated(host) and any(isinstance(hook, EMAHook) for hook in runner.hooks):
            raise ValueError(
                'custom_hooks must hold mmdyt.KeepRateHook or EMAHook, got both. Gates are fitted at once.'
            )
        if runner.max_iters < 1:
            raise ValueError(f'max_iters must be at least 1 with mmdyt.KeepRateHook, got {runner.max_iters}.')
        # a run that an error ended left the rate of its last step
        self._wanted = {operation: operation.wanted_rate for operation in operations.values()}
        self._fit_at = max(self.first(runner), runner.iter)
        if self._fitted:  # by the run that goes on
            self.go_on_teaching(host)

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Fit the gates where stage 2 begins; set the rates of this step."""
        host = unwrapped(runner.model)
        if runner.iter >= self._fit_at and not self._fitted:
            self._fit(runner, host)
        done = (runner.iter + 1) / runner.max_iters if self._fitted else 0.0
        for operation, wanted in self._wanted.items():
            operation.keep_rate = scheduled_rate(done, self.begin, self.end, wanted)

    def after_train(self, runner) -> None:
        """The rates that are wanted, whenever training stopped."""
        for operation, wanted in self._wanted.items():
            operation.keep_rate = wanted

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Remember whether gates are fitted, and the teacher."""
        super().after_load_checkpoint(runner, checkpoint)
        self._fitted = runner._resume and checkpoint.get('keep_rate_stage', 1) > 1

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Add whether gates are fitted, and the teacher."""
        super().before_save_checkpoint(runner, checkpoint)
        checkpoint['keep_rate_stage'] = 2 if self._fitted else 1

    def _fit(self, runner, host: nn.Module) -> None:
        """Fit the gates, alike in all processes, and log what they explain; from now on the model teaches."""
        if gated(host):
            precision = partial(runner.optim_wrapper.optim_context, host)
            try:
                with losses_of(host, runner.train_dataloader, self.num_batches, precision) as losses:
                    explained = fit_token_gates(host, losses)
            except Exception:
                save_as_it_is(runner)
                raise
            for operation in gated(host).values():
                for parameter in operation.parameters():
                    broadcast(parameter.data)
            runner.logger.info(fit_sentence(explained, 'token gates'))
        self.begin_teaching(host)
        self._fitted = True
