"""Not a number is never a result: stop training that diverged, save none of it, name predictions that are NaN."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from mmengine.dist import all_gather_object, all_reduce
from mmengine.hooks import CheckpointHook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.runner import IterBasedTrainLoop
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmdyt.core.finite import named_tensors, not_finite, open_buffers
from mmdyt.engine.evaluation import EvaluationHook
from mmdyt.files import NOT_WRITABLE, BadFileError
from mmdyt.registry import HOOKS

EXIT_CODE = 3  # of the tools, by which they know it from each other
PREDICTIONS = ('pred', 'seg_logits')  # how the hosts' names of what a model predicts begin
NAMED = 3  # samples in a message


class NotFiniteError(FloatingPointError):
    """A loss, a weight or a prediction is not a number."""


class UnfinishedError(RuntimeError):
    """A run ends without something that it was asked for, such as a calibration; all else is done and saved."""


@HOOKS.register_module()
class FiniteHook(EvaluationHook):
    """Stop training in the iteration whose loss is not finite, and name the last good checkpoint.

    Weights and the optimizer's state are looked at before each checkpoint and each validation: what is not finite is
    not saved. Finite weights may still be worth nothing, so a checkpoint that no finite loss followed is named together
    with the one before. Distributed processes stop together.
    Where predictions of a validation or test are NaN, the metrics count them as if they were some; they are named in
    the log, and the run ends with an error once all its work is done and saved. A buffer may hold minus infinity: it
    may be a threshold or an attention mask.

    Args:
        tolerate: How many losses in a row may be not finite, >= 0. For mixed precision in fp16, whose loss scaling
            leaves such iterations out.

    Raises:
        ValueError: If the argument is out of range.
    """

    priority = 'BELOW_NORMAL'  # after the loss is logged, before anything is saved

    def __init__(self, tolerate: int = 0):
        if isinstance(tolerate, bool) or not isinstance(tolerate, int) or tolerate < 0:
            raise ValueError(f'tolerate must be an integer of at least 0, got {tolerate!r}.')
        self.tolerate = tolerate
        self._in_a_row = 0
        self._good: str | None = None
        self._nan: list[str] = []  # predictions of the present evaluation, then of all processes

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Look at the losses, and where a checkpoint is due at the weights."""
        losses = {name: torch.as_tensor(value) for name, value in (outputs or {}).items() if 'loss' in name}
        found = [f'{name}={_first_wrong(value)}' for name, value in losses.items() if not value.isfinite().all()]
        if not _anywhere(found):
            self._in_a_row, self._good = 0, runner.message_hub.get_info('last_ckpt')
        else:
            self._in_a_row += 1
            message = f'loss must be finite, got {", ".join(found) or "another in another process"} {_where(runner)}'
            if self._in_a_row > self.tolerate:
                row = f', {self._in_a_row} in a row' if self.tolerate else ''
                raise NotFiniteError(f'{message}{row}. {self._remedy(runner)}')
            runner.logger.warning(f'{message}, {self._in_a_row} of {self.tolerate} in a row that are tolerated.')
        if self._saves(runner):
            self._check_weights(runner)

    def after_train_epoch(self, runner) -> None:
        """Look at the weights, which may be saved now."""
        self._check_weights(runner)

    def before_val(self, runner) -> None:
        """Look at the weights, which would give metrics all the same."""
        self._check_weights(runner)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Save nothing that is not finite, whoever saves."""
        weights = not_finite(checkpoint['state_dict'].items(), open_buffers(_unwrapped(runner.model)))
        self._refuse(runner, weights + not_finite(named_tensors(checkpoint.get('optimizer'), 'optimizer')))

    def begin(self, runner, mode: str) -> None:
        """Forget an earlier evaluation."""
        self._nan = []

    def see(self, runner, batch_idx: int, data_batch, outputs) -> None:
        """Remember the samples whose prediction is NaN."""
        for i, sample in enumerate(outputs or ()):
            if any(tensor.isnan().any() for tensor in _predictions(sample)):
                self._nan.append(sample_name(sample, batch_idx, i))

    def finish(self, runner, metrics: dict | None, mode: str) -> None:
        """Name them in the log."""
        self._nan = list(dict.fromkeys(chain(*all_gather_object(self._nan))))  # samplers repeat some
        if self._nan:
            runner.logger.warning(f'Predictions are NaN for {listed(self._nan)}. The metrics above count them.')

    def after_run(self, runner) -> None:
        """End with an error where the last evaluation has such predictions."""
        if self._nan:
            raise NotFiniteError(
                f'predictions must be numbers, got NaN for {listed(self._nan)}. Training diverged, or these are broken.'
            )

    def _saves(self, runner) -> bool:
        """Whether a checkpoint is due after this iteration."""
        hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook) and not hook.by_epoch]
        return any(
            hook.every_n_train_iters(runner, hook.interval, hook.save_begin)
            or (hook.save_last and hook.is_last_train_iter(runner))
            for hook in hooks
        )

    def _check_weights(self, runner) -> None:
        """Refuse weights and a state of the optimizer that are not finite, in all processes alike."""
        model = _unwrapped(runner.model)
        found = not_finite(model.state_dict().items(), open_buffers(model))
        self._refuse(runner, found + not_finite(_optimizer_tensors(runner.optim_wrapper)), together=True)

    def _refuse(self, runner, found: list[str], together: bool = False) -> None:
        if _anywhere(found) if together else found:
            what = f'{len(found)} of them, first {found[0]},' if found else 'some of another process'
            raise NotFiniteError(
                f'weights must be finite, got NaN or infinity in {what} {_where(runner)}. {self._remedy(runner)}'
            )

    def _remedy(self, runner) -> str:
        """What is left, and what to do."""
        last = runner.message_hub.get_info('last_ckpt')
        there = [path for path in dict.fromkeys((last, self._good)) if path and ('://' in path or Path(path).is_file())]
        left = f'The last good checkpoint is {there[0]}' if there else 'There is no checkpoint yet'
        if there and there[0] != self._good:  # no iteration has shown yet what it is worth
            left += f'; if that diverges too, {there[1]}' if there[1:] else '; if that diverges too, start anew'
        return (
            f'{left}. Lower optim_wrapper.optimizer.lr, if the data are sound; in fp16, let '
            'mmdyt.FiniteHook(tolerate=K) bear K in a row.'
        )


@contextmanager
def watched(runner) -> Iterator[None]:
    """Run with a :class:`FiniteHook`, be there one in the config or not; end with one message and exit code 3.

    A file that cannot be read or written, and a calibration that failed, end the run with one message, too, and exit
    code 1.
    """
    if not any(isinstance(hook, FiniteHook) for hook in runner.hooks):
        runner.register_hook(FiniteHook())
    try:
        yield
    except (NotFiniteError, UnfinishedError, BadFileError, OSError) as error:
        other = isinstance(error, OSError) and not str(error).startswith(NOT_WRITABLE)
        if other or os.environ.get('MMDYT_TRACEBACK'):
            raise
        alike = isinstance(error, NotFiniteError | UnfinishedError)  # in all processes; a bad file is met by one
        if not alike or os.environ.get('LOCAL_RANK', '0') == '0':
            # of a worker the error holds its traceback, and last what it says
            print(f'error: {str(error).strip().rpartition("BadFileError: ")[2]}', file=sys.stderr)
        sys.exit(EXIT_CODE if isinstance(error, NotFiniteError) else 1)


def sample_name(sample, batch_idx: int, index: int) -> str:
    """The file that a prediction belongs to, or where it stands."""
    return sample_file(sample) or f'sample {index} of batch {batch_idx}'


def sample_file(sample) -> str | None:
    """The file that a prediction belongs to, where it tells."""
    if not isinstance(sample, BaseDataElement):
        return None
    return file_of(sample)


def file_of(info: BaseDataElement | Mapping) -> str | None:
    """The file of what is known of a sample."""
    return next((info.get(key) for key in ('img_path', 'filename') if isinstance(info.get(key), str)), None)


def listed(names: Sequence[str]) -> str:
    """How many samples, and the first ones."""
    more = f' and {len(names) - NAMED} more' if len(names) > NAMED else ''
    return f'{len(names)} sample{"s" * (len(names) != 1)}, {", ".join(names[:NAMED])}{more}'


def _predictions(sample) -> Iterator[Tensor]:
    """The floating tensors of a sample that the model predicted; labels may be anything."""
    items = dict(sample.all_items()) if isinstance(sample, BaseDataElement) else sample
    if isinstance(items, Mapping):
        for name, value in items.items():
            if str(name).startswith(PREDICTIONS):
                value = dict(value.all_items()) if isinstance(value, BaseDataElement) else value
                yield from (tensor for _, tensor in named_tensors(value) if tensor.is_floating_point())


def _optimizer_tensors(wrapper) -> Iterator[tuple[str, Tensor]]:
    """The state of all optimizers of a runner; nothing before they are built."""
    wrappers = list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    states = [list(one.optimizer.state.values()) for one in wrappers if hasattr(one, 'optimizer')]
    return named_tensors(states, 'optimizer')


def _anywhere(found: Sequence) -> bool:
    """Whether something was found, in this process or another."""
    flag = torch.tensor(float(bool(found)))
    all_reduce(flag, 'max')
    return bool(flag)


def _first_wrong(value: Tensor) -> float:
    return value[~value.isfinite()].flatten()[0].item()


def _where(runner) -> str:
    """The iteration that is done, as logs and checkpoints count it."""
    done = runner.message_hub.get_info('iter')  # the runner's own would build what a test has no need of
    if done is None:
        return 'before training'
    epoch = '' if isinstance(runner.train_loop, IterBasedTrainLoop) else f' (epoch {runner.epoch + 1})'
    return f'in iteration {done + 1}{epoch}'


def _unwrapped(model):
    return model.module if is_model_wrapper(model) else model
