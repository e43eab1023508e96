"""What inference really cost, sample by sample: rates and multiply-adds from what the branches ran."""

from collections.abc import Callable
from contextlib import ExitStack
from itertools import chain

import numpy as np
import torch
import torch.nn as nn
from mmengine.dist import all_gather_object
from torch import Tensor

from mmdyt.core.branch import BranchRun
from mmdyt.core.dispatch import Dispatch
from mmdyt.core.observe import record_dispatch
from mmdyt.engine.finite import sample_file
from mmdyt.engine.host import branch_labels, find_host, is_recognizer, part_macs
from mmdyt.engine.own_images import of_each

LAYER_RATE = 'activation_rate/'
OF_BRANCHES = ('active', 'seen', 'broken')
TOTALS = ('backbone', 'backbone_dense', 'neck', 'head', 'views', 'passes')
GIGA = 1e9


class CostCounter:
    """Counts what the forward passes of a host model cost, within its context.

    Counted from the masks of the tokens that really ran, in closed form for the backbone and by an operator counter
    for neck and head. All forward passes of a sample are summed. Counts stay on the device until somebody asks.

    Args:
        model: A host model, also in a wrapper.
        place: Where in the data set a sample stands that is this process's i-th, i from 0.
        name: Of the sample at a place, where its predictions do not tell.

    Raises:
        TypeError: If its backbone is none of mmdyt's.
    """

    def __init__(
        self, model: nn.Module, place: Callable[[int], int] = int, name: Callable[[int], str] = 'sample {}'.format
    ):
        self._host = find_host(model)
        self._place, self._name = place, name
        self._forgotten = 0
        self._passes: list[Tensor] = []  # since the last samples: (counts, images, windows or views) of each
        self._counts: list[Tensor] = []  # (counts, samples)
        self._names: list[str] = []
        self._part_macs: dict[tuple, dict[str, int]] = {}
        self._open = ExitStack()

    def __enter__(self) -> 'CostCounter':
        backbone = self._host.backbone
        self._record = self._open.enter_context(record_dispatch(backbone))
        self._rows = [f'{kind}/{name}' for kind in OF_BRANCHES for name in self._record.names] + list(TOTALS)
        handle = backbone.register_forward_hook(self._count)
        self._open.callback(handle.remove)
        return self

    def __exit__(self, *error) -> None:
        self._open.close()

    def _count(self, backbone: nn.Module, args: tuple, features: tuple[Tensor, ...]) -> None:
        """Count one forward pass of the backbone over a batch of images or windows, or of views of clips."""
        if not self._record.here:  # another thread uses the model
            return
        batch, _, *frames, height, width = args[0].shape
        shape = (*frames, height, width)
        if shape not in self._part_macs:
            self._part_macs[shape] = part_macs(self._host, features)
        branches = [self._record.dispatches[name][0] for name in self._record.names]
        runs = {name: run for name, (run,) in self._record.runs.items()}
        self._record.clear()
        padding = next(iter(runs.values())).padding  # the first branch sees all tokens
        decided = list(zip(branches, (runs[name] for name in self._record.names), strict=True))
        counts = [_active(dispatch) for dispatch in branches]
        counts += [_asked(dispatch, run, padding) for dispatch, run in decided]
        counts += [_broken(dispatch.logits) for dispatch in branches]
        counts += [
            backbone.macs_of(backbone.num_patches(height, width) - padding, runs),
            backbone.dense_macs(height, width, padding),
        ]
        images = batch * (frames[0] if frames else 1)
        exactly = dict(dtype=torch.float64, device=args[0].device)
        per_frame = [torch.as_tensor(count, **exactly).expand(images).reshape(batch, -1).sum(1) for count in counts]
        whole = [*self._part_macs[shape].values(), int(bool(frames)), 1]
        per_pass = torch.tensor(whole, **exactly)[:, None].expand(-1, batch)
        self._passes.append(torch.cat([torch.stack(per_frame), per_pass]))

    def add_images(self, number: int, own: int | None = None, names: list[str] | None = None) -> None:
        """Say which samples (images or clips) the forward passes since the last call belong to.

        Args:
            number: How many: once each, however many windows they took.
            own: How many of them count, the first ones; None is all. Others repeat samples of another rank.
            names: Of the samples.
        """
        own = number if own is None else own
        passes, self._passes = self._passes, []
        if passes and is_recognizer(self._host):  # whose views may run a few at a time
            passes = [torch.cat(passes, dim=1)]
        if passes:
            self._counts.append(sum(of_each(counts, number) for counts in passes)[:, :own])
        else:  # nothing ran: what was asked for was in a cache of the host
            self._counts.append(torch.zeros(len(self._rows), own, dtype=torch.float64))
        self._names += (names or self._default_names(number))[:own]

    def add_samples(self, samples: list, own: int | None = None) -> None:
        """As :meth:`add_images`, with what names the samples: their files."""
        files = [sample_file(sample) for sample in samples]
        names = [file or name for file, name in zip(files, self._default_names(len(samples)), strict=True)]
        self.add_images(len(samples), own, names)

    def _default_names(self, number: int) -> list[str]:
        """Of the next samples, by their places."""
        first = self._forgotten + len(self._names)
        return [self._name(self._place(first + i)) for i in range(number)]

    def costs(self) -> 'Costs':
        """Of all samples of all ranks, in the order of the data set; a GPU is waited for once.

        Raises:
            ValueError: If there are none.
        """
        return self._join(all_gather_object(self._mine()))

    def take(self) -> 'Costs':
        """Of the samples of this process since the last call, which are forgotten.

        Raises:
            ValueError: If there are none.
        """
        mine = self._mine()
        self._forgotten += len(self._names)
        self._counts, self._names = [], []
        return self._join([mine])

    def _mine(self) -> tuple[list[int], list[str], np.ndarray | None]:
        """Places, names and counts (K, S) of this process's samples."""
        counts = torch.cat([counts.cpu() for counts in self._counts], dim=1).numpy() if self._counts else None
        return [self._place(self._forgotten + i) for i in range(len(self._names))], self._names, counts

    def _join(self, found: list[tuple]) -> 'Costs':
        """In the order of the data set."""
        found = [one for one in found if one[0]]
        if not found:
            raise ValueError('samples must be counted before their costs are asked for, got none.')
        places, names = ([*chain(*(one[i] for one in found))] for i in (0, 1))
        order = np.argsort(places, kind='stable')
        table = np.concatenate([counts for _, _, counts in found], axis=1)[:, order]
        rows = dict(zip(self._rows, table, strict=True))
        return Costs([names[i] for i in order], branch_labels(self._record.names), rows)

    def report(self) -> dict[str, float]:
        """As of :meth:`Costs.report`."""
        return self.costs().report()


def _active(dispatch: Dispatch) -> Tensor:
    """How many patch tokens of each image a branch ran on; padding counts for none."""
    mask = dispatch.patch_mask.detach()
    return (mask if dispatch.padding is None else mask.masked_fill(dispatch.padding, 0.0)).sum(dim=(1, 2))


def _asked(dispatch: Dispatch, run: BranchRun, padding: Tensor | int) -> Tensor | int:
    """How many patch tokens of each image a branch decided about; none where none was left to be read.

    Where nothing decides, but tokens became fewer, these are all patches of the image: a rate is what is left of them.
    """
    patches = dispatch.patch_mask.shape[1]
    if patches and dispatch.complete and dispatch.owner is not None:
        return dispatch.owner.shape[1] - padding
    return patches - run.padding if patches else 0


def _broken(logits: Tensor | None) -> Tensor | int:
    """How many logits (B, M, 1) of each image are not finite; a rule from outside has none."""
    return 0 if logits is None else (~logits.isfinite()).flatten(1).sum(1)


class Costs:
    """What samples cost, S of them.

    Args:
        names: Of the samples.
        labels: Of the branches by module name, for people.
        rows: Of each kind of count (S,), sums over the passes of a sample.
    """

    def __init__(self, names: list[str], labels: dict[str, str], rows: dict[str, np.ndarray]):
        self.names = names
        self._rows = rows
        self._labels = {name: label for name, label in labels.items() if rows[f'seen/{name}'].any()}
        self._all_labels = labels

    def broken(self) -> tuple[list[str], list[str]]:
        """Samples and branches whose logits are not finite: their masks and costs mean nothing."""
        found = {label: self._rows[f'broken/{name}'] > 0 for name, label in self._all_labels.items()}
        branches = [label for label, samples in found.items() if samples.any()]
        samples = np.any(list(found.values()), axis=0) if found else []
        return [name for name, broken in zip(self.names, samples, strict=False) if broken], branches

    def of(self, part: str) -> np.ndarray:
        """GMACs of each sample, (S,): of ``'total'``, ``'dense'``, or a part, ``'backbone'``, say."""
        rows = self._rows
        decoder = rows['neck'] + rows['head']
        sums = dict(total=rows['backbone'] + decoder, dense=rows['backbone_dense'] + decoder)
        return (sums[part] if part in sums else rows[part]) / GIGA

    def report(self) -> dict[str, float]:
        """Means over all samples and how they are spread; the names are those of
        :class:`~mmdyt.engine.flops.FLOPsHook`.
        """
        rows, total, dense = self._rows, self.of('total'), self.of('dense')
        rates = {
            label: float(rows[f'active/{name}'].sum() / rows[f'seen/{name}'].sum())
            for name, label in self._labels.items()
        }
        report = dict(activation_rate=sum(rates.values()) / len(rates)) if rates else {}
        report |= {f'{LAYER_RATE}{layer}': rate for layer, rate in rates.items()}
        means = dict(gmacs=total, gmacs_dense=dense) | {
            f'gmacs_{part}': self.of(part) for part in ('backbone', 'backbone_dense', 'neck', 'head')
        }
        report |= {name: float(values.mean()) for name, values in means.items()}
        quantiles = dict(min=0, p5=5, median=50, p95=95, max=100)
        report |= {f'gmacs_{name}': float(np.percentile(total, q)) for name, q in quantiles.items()}
        if views := rows['views'].sum():
            report |= dict(gmacs_view=float(total.sum() / views), gmacs_view_dense=float(dense.sum() / views))
            report['views'] = float(views / len(self.names))
        return report

    def lines(self) -> list[dict]:
        """What is known of each sample, plain values; see docs/dispatch.md. Broken logits leave no rate and no cost."""
        rows, parts = self._rows, ('backbone', 'neck', 'head')
        columns = dict(gmacs='total', gmacs_dense='dense') | {f'gmacs_{part}': part for part in parts}
        costs = {key: self.of(part).tolist() for key, part in columns.items()}
        lines = []
        for i, name in enumerate(self.names):
            broken = [label for key, label in self._all_labels.items() if rows[f'broken/{key}'][i]]
            rates = {label: _share(rows, key, i) for key, label in self._labels.items() if rows[f'seen/{key}'][i]}
            line = dict(file=name, passes=int(rows['passes'][i])) | {key: values[i] for key, values in costs.items()}
            line |= dict(activation_rate=sum(rates.values()) / len(rates) if rates else None, rates=rates)
            if broken:
                line |= dict(gmacs=None, gmacs_backbone=None, activation_rate=None, rates={}, broken=broken)
            lines.append(line)
        return lines


def _share(rows: dict[str, np.ndarray], name: str, i: int) -> float:
    """Activation rate of a branch in a sample."""
    return float(rows[f'active/{name}'][i] / rows[f'seen/{name}'][i])
