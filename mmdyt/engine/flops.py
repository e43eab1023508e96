"""Count what inference really cost: activation rate per layer and GMACs per image, beside the dense model's."""

import copy
from contextlib import ExitStack
from itertools import chain

import torch
import torch.nn as nn
from mmengine.dist import all_gather_object, all_reduce
from mmengine.hooks import Hook
from torch import Tensor

from mmdyt.core.macs import count_macs
from mmdyt.core.observe import record_dispatch
from mmdyt.engine.broken_logits import BrokenLogits
from mmdyt.engine.finite import listed, sample_name
from mmdyt.engine.own_images import count_own, of_first
from mmdyt.registry import HOOKS

LAYER_RATE = 'activation_rate/'
TOTALS = ('backbone', 'backbone_dense', 'decoder', 'views')
FOLLOW_MASKS = ('activation_rate', 'gmacs', 'gmacs_backbone', 'gmacs_view')  # which broken logits leave without meaning
HEADS = ('decode_head', 'head', 'cls_head')  # mmseg, mmpretrain, mmaction2


def find_host(model: nn.Module) -> nn.Module:
    """The module that owns the dispatched backbone, inside any wrapper (distributed, test-time augmentation).

    Raises:
        TypeError: If there is none.
    """
    for module in model.modules():
        if hasattr(getattr(module, 'backbone', None), 'dense_macs'):
            return module
    raise TypeError(f'model must have a mmdyt.DyTVisionTransformer as its backbone, got {type(model).__name__}.')


def is_recognizer(host: nn.Module) -> bool:
    """Whether necks and heads follow mmaction2's contract: features are a tensor, a neck returns them and losses."""
    return getattr(host, 'cls_head', None) is not None


def part_macs(host: nn.Module, features: tuple[Tensor, ...]) -> dict[str, int]:
    """MACs of neck and head on one image; auxiliary heads do not run at inference and do not count.

    Args:
        host: The model that owns them.
        features: What its backbone returns for one image, or for one view of a clip; only the shapes are used.

    Returns:
        ``neck`` and ``head``.
    """
    neck = getattr(host, 'neck', None)
    head = next((getattr(host, name) for name in HEADS if getattr(host, name, None) is not None), None)
    features = tuple(torch.empty((1, *f.shape[1:]), device='meta') for f in features)
    if is_recognizer(host):
        (features,) = features
    macs = dict(neck=0, head=0)
    if neck is not None:
        neck = _on_meta(neck)
        macs['neck'] = count_macs(lambda: neck(features))
        with torch.no_grad():
            features = neck(features)
        if is_recognizer(host):
            features, _ = features
    if head is not None:
        head = _on_meta(head)
        macs['head'] = count_macs(lambda: head(features))
    return macs


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy of ``module`` in fp32 and eval mode that has shapes but no values, made without copying these."""
    memo = {}
    for tensor in (*module.parameters(), *module.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_like(tensor, device='meta', dtype=dtype)
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo).eval()


class CostCounter:
    """Counts what the forward passes of a host model cost, within its context.

    Counted from the masks of the tokens that really ran, in closed form for the backbone and by an operator counter
    for neck and head. All forward passes of an image are summed.

    Args:
        model: A host model, also in a wrapper.

    Raises:
        TypeError: If its backbone is none of mmdyt's.
    """

    def __init__(self, model: nn.Module):
        self._host = find_host(model)
        self._passes: list[Tensor] = []  # since the last images: (counts, images, windows or views) of each
        self._images = 0
        self._part_macs: dict[tuple, dict[str, int]] = {}
        self._broken = BrokenLogits()
        self._open = ExitStack()

    def __enter__(self) -> 'CostCounter':
        backbone = self._host.backbone
        self._record = self._open.enter_context(record_dispatch(backbone))
        self._names = [f'{kind}/{name}' for name in self._record.names for kind in ('active', 'seen')] + list(TOTALS)
        self._sums = torch.zeros(len(self._names), dtype=torch.float64)
        handle = backbone.register_forward_hook(self._count)
        self._open.callback(handle.remove)
        return self

    def __exit__(self, *error) -> None:
        self._open.close()

    def _count(self, backbone: nn.Module, args: tuple, features: tuple[Tensor, ...]) -> None:
        """Add up one forward pass of the backbone over a batch of images or windows, or of views of clips."""
        if not self._record.here:  # another thread uses the model
            return
        batch, _, *frames, height, width = args[0].shape
        images = batch * (frames[0] if frames else 1)
        counts = {}
        for name in self._record.names:
            (dispatch,) = self._record.dispatches[name]
            self._broken.look(name, dispatch.logits)
            counts[f'active/{name}'] = dispatch.patch_mask.float().sum(dim=(1, 2))
            counts[f'seen/{name}'] = dispatch.patch_mask.shape[1]
        runs = {name: run for name, (run,) in self._record.runs.items()}
        self._record.clear()
        shape = (*frames, height, width)
        if shape not in self._part_macs:
            self._part_macs[shape] = part_macs(self._host, features)
        counts['backbone'] = backbone.macs_of(backbone.num_patches(height, width), runs)
        counts['backbone_dense'] = backbone.dense_macs(height, width)
        exactly = dict(dtype=torch.float64, device=args[0].device)
        counts = {
            name: torch.as_tensor(count, **exactly).expand(images).reshape(batch, -1).sum(1)
            for name, count in counts.items()
        }
        for name, count in dict(decoder=sum(self._part_macs[shape].values()), views=int(bool(frames))).items():
            counts[name] = torch.full((batch,), count, **exactly)
        self._passes.append(torch.stack([counts[name] for name in self._names]).cpu())

    def add_images(self, number: int, own: int | None = None) -> None:
        """Say which images (or clips) the forward passes since the last call belong to.

        Args:
            number: How many: once each, however many windows they took.
            own: How many of them count, the first ones; None is all. Others repeat images of another rank.
        """
        own = number if own is None else own
        passes, self._passes = self._passes, []
        if passes and is_recognizer(self._host):  # whose views may run a few at a time
            passes = [torch.cat(passes, dim=1)]
        for counts in passes:
            self._sums += of_first(counts, own, number)
        self._images += own

    def add_samples(self, samples: list, batch_idx: int, own: int | None = None) -> None:
        """As :meth:`add_images`, with what names the samples: those with broken logits will be told."""
        self.add_images(len(samples), own)
        self._broken.name([sample_name(sample, batch_idx, i) for i, sample in enumerate(samples)])

    def broken(self) -> tuple[list[str], list[str]]:
        """Samples and branches of all ranks whose logits are not finite; their masks and costs mean nothing."""
        found = all_gather_object((self._broken.samples, self._broken.branches))
        samples, branches = (dict.fromkeys(chain(*parts)) for parts in zip(*found, strict=True))
        return list(samples), [label for name, label in branch_labels(self._record.names).items() if name in branches]

    def report(self) -> dict[str, float]:
        """Means over all images of all ranks; the names are those of :class:`FLOPsHook`."""
        sums = _sum_over_ranks([*self._sums.tolist(), self._images])
        sums = dict(zip([*self._names, 'images'], sums, strict=True))
        images, decoder = sums['images'], sums['decoder']
        total, dense = sums['backbone'] + decoder, sums['backbone_dense'] + decoder
        labels = {name: label for name, label in branch_labels(self._record.names).items() if sums[f'seen/{name}']}
        rates = {label: sums[f'active/{name}'] / sums[f'seen/{name}'] for name, label in labels.items()}
        report = dict(activation_rate=sum(rates.values()) / len(rates)) if rates else {}
        report |= {f'{LAYER_RATE}{layer}': rate for layer, rate in rates.items()}
        report |= dict(
            gmacs=total / images / 1e9,
            gmacs_dense=dense / images / 1e9,
            gmacs_backbone=sums['backbone'] / images / 1e9,
            gmacs_backbone_dense=sums['backbone_dense'] / images / 1e9,
        )
        if views := sums['views']:
            report |= dict(gmacs_view=total / views / 1e9, gmacs_view_dense=dense / views / 1e9)
            report['views'] = views / images
        return report


@HOOKS.register_module()
class FLOPsHook(Hook):
    """Report activation rates and mean GMACs per image at validation and test.

    Counted by :class:`CostCounter`. Sliding windows and test-time views are summed: an image costs what all its forward
    passes cost. A sample of a video data set is a clip: it costs the sum of its views, and each of these that of its
    frames. Dense is the same model without dispatchers and adapters. One multiply-add is one MAC; papers print MACs as
    FLOPs.

    In distributed runs every image counts once: what samplers repeat, to give all ranks equally many, counts nowhere.
    A branch that saw no patch token, since nothing reads them after it (``skip_unread``), has no rate.
    Without dispatchers (baselines) there are no rates to report, only GMACs. Logits that are not finite decide nothing:
    then neither a rate nor what follows from it is reported, and the log names the layers and samples.

    Adds to the metrics: ``activation_rate``, ``activation_rate/layer_<i>`` (fraction of active patch tokens; with
    ``attn_mlp`` dispatch ``layer_<i>_attn`` and ``layer_<i>_mlp``),
    ``gmacs``, ``gmacs_dense``, ``gmacs_backbone``, ``gmacs_backbone_dense`` (means per image or clip); for video
    ``gmacs_view``, ``gmacs_view_dense`` (means per view) and ``views`` (mean per clip).
    """

    def __init__(self):
        self._open = ExitStack()

    def before_run(self, runner) -> None:
        """Refuse a model that cannot be counted, before it is trained."""
        find_host(runner.model)

    def before_val_epoch(self, runner) -> None:
        """Start to count."""
        self._start(runner, 'val')

    def after_val_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Count the images of the batch."""
        own = int(min(len(outputs), self._left))
        self._left -= own
        self._counter.add_samples(outputs, batch_idx, own)

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        """Log, and add to the metrics."""
        self._report(runner, metrics, 'val')

    def before_test_epoch(self, runner) -> None:
        """As for validation."""
        self._start(runner, 'test')

    def after_test_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """As for validation."""
        self.after_val_iter(runner, batch_idx, data_batch, outputs)

    def after_test_epoch(self, runner, metrics: dict | None = None) -> None:
        """As for validation."""
        self._report(runner, metrics, 'test')

    def _start(self, runner, mode: str) -> None:
        """Count from here on, and as many images as are this rank's own."""
        self._open.close()  # a former evaluation may have been cut short
        self._left = count_own(getattr(runner, f'{mode}_dataloader', None))
        self._counter = self._open.enter_context(CostCounter(runner.model))

    def _report(self, runner, metrics: dict | None, mode: str) -> None:
        """Into the log, the message hub and the metrics."""
        self._open.close()
        report = self._counter.report()
        samples, layers = self._counter.broken()
        if layers:
            report = {k: v for k, v in report.items() if k not in FOLLOW_MASKS and not k.startswith(LAYER_RATE)}
            runner.logger.warning(
                f'No activation rate and no GMACs: logits of {", ".join(layers)} are NaN or infinite for '
                f'{listed(samples)}. Dense: {report["gmacs_dense"]:.3f} GMACs per sample.'
            )
        else:
            runner.logger.info(_sentence(report, getattr(find_host(runner.model), 'target_rate', None)))
        for name, value in report.items():
            runner.message_hub.update_scalar(f'{mode}/{name}', value)
        if metrics is not None:
            metrics.update(report)


def _sum_over_ranks(values: list[float]) -> list[float]:
    """Sum of each value over the ranks of a distributed run."""
    total = torch.tensor(values, dtype=torch.float64)
    all_reduce(total)
    return total.tolist()


def branch_labels(names: list[str]) -> dict[str, str]:
    """``layers.3.dynamic.mlp`` -> ``layer_3``; where a layer has two dispatchers, ``layer_3_mlp``."""
    parts = [name.split('.') for name in names]
    several = len(names) > len({i for _, i, _, _ in parts})
    return {'.'.join(p): f'layer_{p[1]}_{p[3]}' if several else f'layer_{p[1]}' for p in parts}


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
