"""Report what inference really cost: activation rate per layer and GMACs, beside the dense model's."""

import json
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn as nn
from mmengine.dist import is_main_process

from mmdyt.core.observe import DispatchRecord, dynamic_branches, record_dispatch
from mmdyt.core.options import check_switches, is_integer
from mmdyt.engine.costs import LAYER_RATE, CostCounter, Costs
from mmdyt.engine.evaluation import EvaluationHook
from mmdyt.engine.finite import listed
from mmdyt.engine.host import branch_labels, find_host
from mmdyt.engine.own_images import OwnSamples, name_in_dataset, place_in_dataset
from mmdyt.files import write_text
from mmdyt.registry import HOOKS

FOLLOW_MASKS = ('activation_rate', 'gmacs', 'gmacs_backbone', 'gmacs_view')  # which broken logits leave without meaning
SPREAD = ('gmacs_min', 'gmacs_p5', 'gmacs_median', 'gmacs_p95', 'gmacs_max')  # likewise


@HOOKS.register_module()
class FLOPsHook(EvaluationHook):
    """Report activation rates and GMACs of every image at validation and test, and rates while a model is trained.

    Counted by :class:`~mmdyt.engine.costs.CostCounter`. Sliding windows and test-time views are summed: an image costs
    what all its forward passes cost. A sample of a video data set is a clip: it costs the sum of its views, and each of
    these that of its frames. Dense is the same model without dispatchers and adapters. One multiply-add is one MAC;
    papers print MACs as FLOPs.

    In distributed runs every image counts once: what samplers repeat, to give all ranks equally many, counts nowhere.
    A branch that saw no patch token, since nothing reads them after it (``skip_unread``), has no rate.
    Without dispatchers (baselines) there are no rates to report, only GMACs; but where parts make the tokens fewer, the
    rate of a layer is the share of the image's patch tokens that is left for its MLP. Logits that are not finite decide
    nothing: then neither a rate nor what follows from it is reported, and the log names the layers and samples.

    Adds to the metrics: ``activation_rate``, ``activation_rate/layer_<i>`` (fraction of active patch tokens; with
    ``attn_mlp`` dispatch ``layer_<i>_attn`` and ``layer_<i>_mlp``),
    ``gmacs``, ``gmacs_dense``, ``gmacs_backbone``, ``gmacs_backbone_dense``, ``gmacs_neck``, ``gmacs_head`` (means per
    image or clip); ``gmacs_min``, ``gmacs_p5``, ``gmacs_median``, ``gmacs_p95``, ``gmacs_max`` over the images; for
    video ``gmacs_view``, ``gmacs_view_dense`` (means per view) and ``views`` (mean per clip).

    Args:
        lines: Whether each test writes a line of JSON for each image, ``costs_test.jsonl`` beside the log, and each
            validation ``costs_val.jsonl``; see docs/dispatch.md.
        train_interval: Steps of training after which the activation rate of each branch goes to the visualisation back
            ends, as ``train/activation_rate/layer_<i>``; 0 is never.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, lines: bool = True, train_interval: int = 50):
        check_switches(lines=lines)
        if not (is_integer(train_interval) and train_interval >= 0):
            raise ValueError(f'train_interval must be at least 0, got {train_interval!r}.')
        self._lines = lines
        self._train_interval = train_interval
        self._open = ExitStack()
        self._record: DispatchRecord | None = None

    def before_run(self, runner) -> None:
        """Refuse a model that cannot be counted, before it is trained."""
        find_host(runner.model)

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Watch the steps that are due."""
        if self._train_interval and (runner.iter + 1) % self._train_interval == 0:
            self._open.close()
            self._record = self._open.enter_context(record_dispatch(find_host(runner.model).backbone))

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Rates of this step's masks, those of training."""
        record, self._record = self._record, None
        if record is None:
            return
        self._open.close()
        rates = {}
        for name, label in branch_labels(record.names).items():
            masks = [d.counted(d.patch_mask.detach()) for d in record.dispatches[name] if not d.complete]
            if masks and masks[0].numel():
                rates[f'train/{LAYER_RATE}{label}'] = torch.cat(masks).mean()
        if rates:
            runner.visualizer.add_scalars({name: rate.item() for name, rate in rates.items()}, step=runner.iter + 1)

    def begin(self, runner, mode: str) -> None:
        """Count from here on, and as many images as are this rank's own."""
        self._open.close()  # a former evaluation may have been cut short
        loader = getattr(runner, f'{mode}_dataloader', None)
        self._own = OwnSamples(loader)
        counter = CostCounter(runner.model, place_in_dataset(loader), name_in_dataset(loader))
        self._counter = self._open.enter_context(counter)

    def see(self, runner, batch_idx: int, data_batch, outputs) -> None:
        """Count the images of the batch."""
        self._counter.add_samples(outputs, self._own.of(len(outputs)))

    def finish(self, runner, metrics: dict | None, mode: str) -> None:
        """Into the log and the metrics, and image by image into a file."""
        self._open.close()
        costs = self._counter.costs()
        report, (samples, layers) = costs.report(), costs.broken()
        if layers:
            follow = (*FOLLOW_MASKS, *SPREAD)
            report = {k: v for k, v in report.items() if k not in follow and not k.startswith(LAYER_RATE)}
            runner.logger.warning(
                f'No activation rate and no GMACs: logits of {", ".join(layers)} are NaN or infinite for '
                f'{listed(samples)}. Dense: {report["gmacs_dense"]:.3f} GMACs per sample.'
            )
        else:
            runner.logger.info(_sentence(report, _wanted(find_host(runner.model))))
            if report['gmacs_min'] < report['gmacs_max']:
                spread = ', '.join(f'{name.split("_")[1]} {report[name]:.3f}' for name in SPREAD)
                runner.logger.info(f'GMACs of single samples: {spread}.')
        self.publish(runner, report, metrics, mode)
        if mode == 'test' and (visualizer := getattr(runner, 'visualizer', None)):  # mmengine sends them no test
            visualizer.add_scalars({f'test/{name}': value for name, value in report.items()}, step=runner.iter)
        if self._lines and is_main_process():
            self._write(runner, costs, mode)

    def _write(self, runner, costs: Costs, mode: str) -> None:
        """One line of strict JSON for each sample, in the order of the data set."""
        file = Path(runner.log_dir, f'costs_{mode}.jsonl')
        write_text(file, ''.join(json.dumps(line, allow_nan=False) + '\n' for line in costs.lines()))
        runner.logger.info(f'Cost of each sample: {file}.')


def _wanted(host: nn.Module) -> float | None:
    """The rate that a model was asked for; None where its dispatchers follow none."""
    deciders = [branch.dispatcher.decider for branch in dynamic_branches(host).values()]
    follow = any(dispatcher.adjustable or dispatcher.rate is not None for dispatcher in deciders)
    return getattr(host, 'target_rate', None) if follow else None


def _sentence(report: dict[str, float], target: float | None) -> str:
    rates = {name: rate for name, rate in report.items() if name.startswith(LAYER_RATE)}
    wanted = '' if target is None else f' (target {target:.2f})'
    layers = ' '.join(f'{rate:.2f}' for rate in rates.values())
    sample, views = 'image', ''
    if 'views' in report:
        sample = f'clip of {report["views"]:g} view{"s" * (report["views"] != 1)}'
        views = f'; per view {report["gmacs_view"]:.3f} of {report["gmacs_view_dense"]:.3f}'
    return (
        (f'Activation rate {report["activation_rate"]:.3f}{wanted}, by layer {layers}. ' if rates else '')
        + f'GMACs per {sample}: {report["gmacs"]:.3f} of {report["gmacs_dense"]:.3f} dense, '
        f'backbone {report["gmacs_backbone"]:.3f} of {report["gmacs_backbone_dense"]:.3f}{views}. '
        'These are MACs (papers print them as FLOPs).'
    )
