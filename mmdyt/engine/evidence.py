"""Train with all tokens, fit the dispatchers to what skipping costs, then close them to the target rate."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

import torch
import torch.nn as nn
from mmengine.dist import all_gather, broadcast
from mmengine.hooks import EMAHook
from torch.utils.data import DataLoader

from mmdyt.core.fit.calibrate import set_threshold, threshold_for, token_dispatchers
from mmdyt.core.fit.evidence import fit_dispatchers
from mmdyt.core.fit.mean_update import fit_mean_updates
from mmdyt.core.fit.restore import unless_refused
from mmdyt.core.observe import dynamic_branches, record_dispatch
from mmdyt.core.options import check_switches, is_number
from mmdyt.registry import HOOKS

from .calibration import seeded, some_batches, unwrapped, wanted_rate
from .stages import StagedHook, save_as_it_is, scheduled_rate


@contextmanager
def losses_of(
    host: nn.Module,
    train: DataLoader,
    num_batches: int,
    precision: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[list[Callable[[], torch.Tensor]]]:
    """Within the context, the host's own losses of some training images, always the same ones, to fit gates by.

    Those that Dynamic Tuning adds say nothing about tokens. The random numbers of the process go on afterwards as if
    nothing had been.

    Args:
        host: A model of mmpretrain, mmseg or mmaction2, without a wrapper.
        train: Whose images, pipeline and batch size are used.
        num_batches: How many batches, >= 1. They stay in memory meanwhile.
        precision: Makes the context in which losses are computed, automatic mixed precision, say.
    """

    def loss(batch: dict) -> torch.Tensor:
        with precision():
            losses = host(**host.data_preprocessor(batch, True), mode='loss')
        return host.parse_losses(losses)[0]

    own = host.host_losses() if hasattr(host, 'host_losses') else nullcontext()
    with own, seeded():
        yield [partial(loss, batch) for batch in some_batches(train, None, num_batches)]


def fit_host(
    host: nn.Module,
    train: DataLoader,
    num_batches: int,
    precision: Callable[[], AbstractContextManager] = nullcontext,
    per_mac: bool = False,
) -> dict[str, float]:
    """Fit the dispatchers of a host model on training images, in the pipeline of training.

    First what inactive tokens get, where the model has such a part: evidence is what a token gains over that.

    Args:
        host: As of :func:`losses_of`.
        train: Likewise.
        num_batches: Likewise.
        precision: Likewise.
        per_mac: As of :func:`mmdyt.core.fit.evidence.fit_dispatchers`.

    Returns:
        As of :func:`mmdyt.core.fit.evidence.fit_dispatchers`.
    """
    with losses_of(host, train, num_batches, precision) as losses, unless_refused(host):
        fit_mean_updates(host, losses)
        return fit_dispatchers(host, losses, per_mac=per_mac)


def fit_sentence(explained: dict[str, float], what: str = 'dispatchers') -> str:
    """How well evidence can be told from tokens, for people."""
    shares = ' '.join(f'{share:.2f}' for share in explained.values())
    return f'Fitted {what}; explained variance of the log evidence by layer {shares}.'


def of_all_ranks(values: torch.Tensor) -> torch.Tensor:
    """The values (M,) of all ranks one after the other, in the same order on each; they may have unequally many."""
    numbers = [int(number) for number in all_gather(torch.tensor([len(values)], device=values.device))]
    padded = values.new_zeros(max(numbers))
    padded[: len(values)] = values
    return torch.cat([part[:number] for part, number in zip(all_gather(padded), numbers, strict=True)])


@HOOKS.register_module()
class EvidenceHook(StagedHook):
    """Rate-exact training in three stages, with one forward pass a step.

    1. Up to ``begin`` every token is active: the plain adapter is trained.
    2. What inactive tokens get is set to the mean update (:func:`mmdyt.core.fit.mean_update.fit_mean_updates`), if the
       model has such a part; the gates are fitted in closed form (:func:`mmdyt.core.fit.evidence.fit_dispatchers`) on a
       few batches of training images; and from there to ``end`` the activation rate falls in a straight line from 1 to
       the target rate.
    3. At the target rate the rest of training runs as inference does.

    One threshold holds for all branches: the quantile of the logits of the last training batch, that of all processes
    together. Nothing is drawn at random, and no loss asks for the rate: the model wants ``rate_weight=0``, its
    dispatchers ``noise=False``, and ``fitted=True``, which leaves the gates as they are. Masks have the
    straight-through gradient of their scores, which reaches the adapters of the layers below. Everything that a
    resumed run needs is in the checkpoint.
    A :class:`~mmdyt.engine.calibration.CalibrationHook` belongs behind this one.  # differs from paper: opt-in.

    Args:
        begin: Where stage 1 ends, as a fraction of training, in [0, 1); at the earliest after the first step.
        end: Where stage 2 ends, in [begin, 1].
        num_batches: Batches of training images that the gates are fitted on, >= 1. They stay in memory meanwhile.
        feature_weight: >= 0; from stage 2 on hold the features of the backbone to those that the complete model gives
            with the parameters of the end of stage 1, by this weight
            (:class:`mmdyt.core.teacher.FeatureTeacher`). Costs a forward pass without gradients in each step.
        per_mac: Fit evidence per multiply-add, for branches that differ in cost (``attn_mlp``).
        inactive_weight: >= 0; a cell of the features that skipped everything since the level before counts 1 + this as
            much in that loss as one that ran everything, their mean made 1
            (:func:`mmdyt.core.levels.inactive_weights`). For backbones that give maps. 0 counts all cells alike.
            # differs from paper: opt-in.

    Raises:
        ValueError: If an argument is out of range, or, before training, if the model has no dispatchers, or such that
            sample their masks, or a rate loss, or no maps to weigh the cells of, or if weights are averaged
            (``EMAHook``).
    """

    def __init__(
        self,
        begin: float = 0.15,
        end: float = 0.5,
        num_batches: int = 8,
        feature_weight: float = 0.0,
        per_mac: bool = False,
        inactive_weight: float = 0.0,
    ):
        super().__init__(begin, end, num_batches, feature_weight, inactive_weight)
        if not (is_number(inactive_weight) and inactive_weight >= 0):
            raise ValueError(f'inactive_weight must be at least 0, got {inactive_weight!r}.')
        if inactive_weight and not feature_weight:
            raise ValueError(f'inactive_weight must be 0 without a feature_weight, got {inactive_weight}.')
        check_switches(per_mac=per_mac)
        self.per_mac = per_mac
        self._open = ExitStack()

    def before_train(self, runner) -> None:
        """Refuse a model that cannot be trained so; open all dispatchers of a new run."""
        if any(isinstance(hook, EMAHook) for hook in runner.hooks):
            raise ValueError(
                'custom_hooks must hold mmdyt.EvidenceHook or EMAHook, got both. Gates are fitted at once.'
            )
        if runner.max_iters < 1:
            raise ValueError(f'max_iters must be at least 1 with mmdyt.EvidenceHook, got {runner.max_iters}.')
        host = unwrapped(runner.model)
        wanted_rate(host, None)
        for name, dispatcher in token_dispatchers(host).items():
            if dispatcher.noise:
                raise ValueError(f'{name}.dispatcher must not sample with mmdyt.EvidenceHook, got noise=True.')
        if getattr(host, 'rate_weight', 0):
            raise ValueError(f'rate_weight must be 0 with mmdyt.EvidenceHook, got {host.rate_weight}.')
        out_type = getattr(host.backbone, 'out_type', None)
        if self.inactive_weight and out_type != 'featmap':
            raise ValueError(
                f"inactive_weight must be 0 unless the backbone gives maps (out_type='featmap'), got "
                f'{self.inactive_weight} with out_type={out_type!r}.'
            )
        self._fit_at = self.first(runner)
        if runner.iter <= self._fit_at:
            set_threshold(token_dispatchers(host), -math.inf)
        elif all(dispatcher.threshold == -math.inf for dispatcher in token_dispatchers(host).values()):
            self._fit_at = runner.iter  # resumed with a shorter stage 1 than it was begun with
        else:
            self.go_on_teaching(host)

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Fit the gates where stage 2 begins; watch the logits from there."""
        if runner.iter < self.first(runner):
            return
        host = unwrapped(runner.model)
        if runner.iter == self._fit_at:
            self._fit(runner, host)
        self._record = self._open.enter_context(record_dispatch(host))

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Move the threshold to where the next step's rate asks for it."""
        if runner.iter < self.first(runner):
            return
        host = unwrapped(runner.model)
        logits = [d.counted(d.logits.detach()) for d in self._record.flat() if d.logits is not None]
        self._open.close()
        progress = (runner.iter + 1) / runner.max_iters  # of the next step
        rate = scheduled_rate(progress, self.begin, self.end, wanted_rate(host, None))
        threshold = torch.tensor(
            threshold_for(of_all_ranks(torch.cat(logits)), rate)
        )  # as exact as a checkpoint has it
        set_threshold(token_dispatchers(host), threshold.item())
        runner.message_hub.update_scalar('train/scheduled_rate', rate)

    def _fit(self, runner, host: nn.Module) -> None:
        """Fit the gates, alike in all processes, and log what they explain."""
        # all processes, on the same batches: the losses of a host may wait for each other
        precision = partial(runner.optim_wrapper.optim_context, host)
        try:
            explained = fit_host(host, runner.train_dataloader, self.num_batches, precision, self.per_mac)
        except Exception:
            save_as_it_is(runner)
            raise
        for branch in dynamic_branches(host).values():
            for part in (branch.dispatcher, *branch.deltas('inactive')):
                for parameter in part.parameters():
                    broadcast(parameter.data)
        self.begin_teaching(host)
        runner.logger.info(fit_sentence(explained))
