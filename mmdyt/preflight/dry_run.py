"""Does the model train on one sample, predict another, and do metrics, hooks and optimizer take what it gives?"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn as nn
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner, TestLoop, ValLoop
from mmengine.runner.amp import autocast
from mmengine.structures import BaseDataElement
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from .names import near
from .refusals import Refusal, part

STEPS = EpochBasedTrainLoop.run_iter, IterBasedTrainLoop.run_iter, ValLoop.run_iter, TestLoop.run_iter
HOSTS = ('mmengine', 'mmpretrain', 'mmseg', 'mmaction', 'mmdyt')
HOOK_METRICS = ('activation_rate', 'gmacs', 'views', 'random_masks/')  # that hooks of this package add to a metric's


@contextmanager
def _tried(where: str, rule: str) -> Iterator[None]:
    """As :func:`part`, and says how to start all the same: a hook of the user's own may make good what is missing."""
    try:
        with part(where, rule):
            yield
    except Refusal as error:
        raise Refusal(f'{error} To start without this trial: --no-dry-run.') from error


def run_training(runner: Runner) -> None:
    """Refuse a model that has no loss for a sample of the training set; a loop of a user's own is left alone."""
    if type(runner.train_loop).run_iter not in STEPS or type(runner.model).train_step is not BaseModel.train_step:
        return
    batch = _one(runner.train_loop.dataloader, 'train_dataloader')
    model = runner.model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()  # one sample has no variance
    with _tried('model', 'have a loss for a sample of train_dataloader'), runner.optim_wrapper.optim_context(model):
        model.parse_losses(model._run_forward(model.data_preprocessor(batch, True), mode='loss'))


def run_evaluation(runner: Runner, loop: str) -> dict | None:
    """Refuse a model that cannot predict a sample, or metrics that cannot judge it; returns what they call it.

    Metrics of a user's own may need more samples than one: they are left alone, and so is a loop.
    """
    found = getattr(runner, f'{loop}_loop')
    if type(found).run_iter not in STEPS:
        return None
    batch = _one(found.dataloader, f'{loop}_dataloader')
    runner.model.eval()
    trial, mixed = _tried('model', f'predict a sample of {loop}_dataloader'), autocast(enabled=found.fp16)
    with trial, torch.no_grad(), mixed, windows_once(runner.model):
        outputs = getattr(runner.model, f'{loop}_step')(batch)
    last = outputs[-1] if outputs else None
    if isinstance(last, BaseDataElement) and last.keys() == ['loss']:  # of a model that has a loss there, too
        outputs = outputs[:-1]
    if any(type(metric).__module__.split('.')[0] not in HOSTS for metric in found.evaluator.metrics):
        return None
    with _tried(f'{loop}_evaluator', f'judge a prediction for {loop}_dataloader'), torch.no_grad():
        found.evaluator.process(data_samples=outputs, data_batch=batch)
        return found.evaluator.evaluate(1)


@contextmanager
def windows_once(model: nn.Module) -> Iterator[None]:
    """Of the windows that slide over an image, mmseg's segmentors run one of each shape; the others get its result.

    What cannot be predicted fails in the first one. A large image has dozens, each as dear as a small image.
    """
    sliding = [one for one in model.modules() if hasattr(one, 'slide_inference') and hasattr(one, 'encode_decode')]
    stock = [one for one in sliding if one.encode_decode.__module__.split('.')[0] in HOSTS]
    for module in stock:
        module.encode_decode = _each_shape_once(module.encode_decode)
    try:
        yield
    finally:
        for module in stock:
            del module.encode_decode  # the method of its class is seen again


def _each_shape_once(encode_decode: Callable) -> Callable:
    found = {}

    def once(inputs: torch.Tensor, *args, **options) -> torch.Tensor:
        if inputs.shape not in found:
            found[inputs.shape] = encode_decode(inputs, *args, **options)
        return found[inputs.shape]

    return once


def check_metrics(runner: Runner, metrics: Mapping) -> None:
    """Refuse hooks and schedulers that wait for a metric which there is not."""
    waiting = [
        (f'{type(hook).__name__}.save_best', name)
        for hook in runner.hooks
        if isinstance(hook, CheckpointHook)
        for name in hook.save_best or []
    ]
    schedulers = runner.param_schedulers if isinstance(runner.param_schedulers, list) else []
    waiting += [(f'{type(s).__name__}.monitor', s.monitor) for s in schedulers if getattr(s, 'monitor', None)]
    adding = [type(hook) for hook in runner.hooks if 'after_val_epoch' in vars(type(hook))]
    if any(kind.__module__.split('.')[0] not in HOSTS for kind in adding):
        return  # a user's hook may add metrics, too
    for where, name in waiting:
        if name not in metrics and name != 'auto' and not name.startswith(HOOK_METRICS):
            raise ValueError(
                f'{where} must name a metric of val_evaluator, {", ".join(metrics)}, got {name!r}.{near(name, metrics)}'
            )


def run_update(runner: Runner) -> None:
    """Refuse an optimizer that cannot step; the gradients of the step are 0."""
    if isinstance(runner.optim_wrapper, OptimWrapperDict):
        return
    parameters = [p for p in runner.model.parameters() if p.requires_grad]
    with part('model'):
        if not parameters:
            raise ValueError('requires_grad must be left on for some parameter, got none that is trained.')
    with _tried('optim_wrapper', 'take a step'):
        runner.optim_wrapper.update_params(sum(p.sum() * 0 for p in parameters))


def _one(loader: DataLoader, name: str) -> dict:
    """A batch of one sample."""
    with part(name, 'give a sample'):
        if hasattr(loader.dataset, '__len__'):
            return loader.collate_fn([loader.dataset[0]])
        return next(iter(loader))
