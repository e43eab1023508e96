"""Time the inference of several variants of a model beside each other, and count what they really ran.

Variants take turns, round by round, so that what else the machine does falls on all of them alike; ratios are taken
within a round. What disturbs (counting, the split into parts, memory) has passes of its own.
"""

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor

from mmdyt.core.observe import dynamic_branches, record_dispatch
from mmdyt.engine.benchmark.graphs import Replayed
from mmdyt.engine.benchmark.images import Images
from mmdyt.engine.benchmark.memory import peak_memory
from mmdyt.engine.benchmark.request import DTYPES, BenchmarkRequest
from mmdyt.engine.benchmark.variants import PARTS, Network, Variant, wait
from mmdyt.engine.costs import CostCounter
from mmdyt.engine.host import HEADS, is_recognizer

WARM_UP, WARM_UP_COMPILED = 2, 4  # rounds; packed shapes change with the images, and are compiled twice
SPLIT_ROUNDS = 7  # at most
LEAST_SAVING = 0.01  # of the multiply-adds, below which a share of it says nothing
RECOMPILES = 1024  # all variants run the same code, and each of their layers may be compiled on its own

Progress = Callable[[], None]


def measure(
    variants: Sequence[Variant], images: Images, request: BenchmarkRequest, progress: Progress = lambda: None
) -> Iterator[tuple[list[dict], list[dict]]]:
    """Time all variants on each device, in each dtype and batch.

    Args:
        variants: In fp32 on the CPU; the first is the dense one, by which the others are measured.
        images: Other ones in each round.
        request: What was asked for.
        progress: Called after each round.

    Yields:
        For each device, dtype and batch its rows, see docs/benchmarks.md, and the variants that could not run, with the
        reason.
    """
    for device, dtype, networks in placed(variants, request):
        for batch in request.batch:
            where = dict(device=device, dtype=dtype, batch=batch)
            rows, failed = _setting(networks, images, request, batch, progress)
            yield [_in_order(where | row, images) for row in rows], [where | one for one in failed]


def count_rounds(request: BenchmarkRequest) -> int:
    """How often :func:`measure` calls ``progress``."""
    rounds = _warm_up(request) + request.rounds + min(request.rounds, SPLIT_ROUNDS)
    return rounds * len(request.devices()) * len(request.dtype) * len(request.batch)


def placed(variants: Sequence[Variant], request: BenchmarkRequest) -> Iterator[tuple[str, str, list[Variant]]]:
    """The variants on each device, in each dtype; with their compiled twins behind them."""
    torch.set_num_threads(request.threads)
    for device in request.devices():
        for dtype in request.dtype:
            found = copy.deepcopy(list(variants))  # together, so that they go on sharing parameters
            for variant in found:
                variant.network.cast(device, DTYPES[dtype])
            if request.compiled:
                found += [replace(one, network=one.network.compiled(), compiled=True) for one in found]
            if request.cuda_graphs:
                found += [replace(one, cuda_graph=True) for one in found]
            yield device, dtype, found


def take_rounds(
    networks: Sequence[Callable[[Tensor], object]], batches: Sequence[Tensor], warm_up: int, progress: Progress
) -> list[list]:
    """Seconds of each network on each batch: all run once a round, each round begins with another one.

    Args:
        networks: On the device of the batches.
        batches: One a round; the first ones warm up.
        warm_up: How many are not timed.
        progress: Called after each round.

    Returns:
        One list for each network, in the order of the rounds.
    """
    seconds = [[] for _ in networks]
    for round_, batch in enumerate(batches):
        for i in turns(len(networks), round_):
            took = _seconds(networks[i], batch)
            if round_ >= warm_up:
                seconds[i].append(took)
        progress()
    return seconds


def turns(number: int, round_: int) -> list[int]:
    """The order of a round: each begins with the next one."""
    return [(round_ + i) % number for i in range(number)]


def ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(mine / first for mine, first in zip(seconds, base, strict=True))


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of them lies, linear between neighbours."""
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


@torch.no_grad()
def _setting(variants: list[Variant], images: Images, request: BenchmarkRequest, batch: int, progress: Progress):
    """Rows of all variants at one batch size, and those that cannot run."""
    first = next(variants[0].network.parameters())
    warm_up = _warm_up(request)
    batches = images.deal(batch, warm_up + request.rounds, request.seed, like=first)
    with many_compiled() if request.compiled else nullcontext():
        guards = [_Guard(_runner(variant)) for variant in variants]
        seconds = take_rounds(guards, batches, warm_up, progress)
        failed = _failures(variants, guards)
        seconds = [took for variant, took in zip(variants, seconds, strict=True) if variant.name not in failed]
        variants = [variant for variant in variants if variant.name not in failed]
        alone = [variant.network for variant in variants if not variant.cuda_graph]  # a graph is all of it, or nothing
        splits = iter(_splits(alone, batches[warm_up:][:SPLIT_ROUNDS], progress))
        memory = iter([peak_memory(network, batches[-1]) for network in alone])
    costs, rows = {}, []
    for variant, took in zip(variants, seconds, strict=True):
        key = replace(variant, compiled=False, cuda_graph=False, network=None).name
        costs[key] = costs.get(key) or count(variant.network, batches[warm_up:])
        base = seconds[[one.mode for one in variants].index(variant.mode)]
        found = dict(split_ms=None, peak_memory_mb=None)
        if not variant.cuda_graph:
            found = dict(split_ms=next(splits), peak_memory_mb=next(memory))
        rows.append(_row(variant, took, base, costs[key]) | found)
    return rows, [dict(variant=name, reason=reason) for name, reason in failed.items()]


def _warm_up(request: BenchmarkRequest) -> int:
    return WARM_UP_COMPILED if request.compiled else WARM_UP


def _runner(variant: Variant) -> Callable[[Tensor], object]:
    return Replayed(variant.network) if variant.cuda_graph else variant.network


class _Guard:
    """A network that does nothing more after its first error: the results of the others are worth having."""

    def __init__(self, network: Callable[[Tensor], object]):
        self.network = network
        self.reason: str | None = None

    def __call__(self, batch: Tensor) -> None:
        if self.reason is None:
            try:
                self.network(batch)
            except (RuntimeError, ValueError) as error:  # out of memory, at some batch, or what an executor refuses
                lines = str(error).strip().splitlines() or ['']
                self.reason = f'{type(error).__name__}: {lines[0]}'


def _failures(variants: Sequence[Variant], guards: Sequence[_Guard]) -> dict[str, str]:
    """Why variants could not run, by name."""
    failed = {one.name: guard.reason for one, guard in zip(variants, guards, strict=True) if guard.reason}
    for one in variants:
        if replace(variants[0], compiled=one.compiled, cuda_graph=one.cuda_graph).name in failed:
            failed.setdefault(one.name, 'there is no dense model to measure it by')
    return failed


def _seconds(network: Callable[[Tensor], object], batch: Tensor) -> float:
    """Of one pass; a GPU is waited for before and after."""
    wait(batch)
    start = perf_counter()
    network(batch)
    wait(batch)
    return perf_counter() - start


def _splits(networks: Sequence[Network], batches: Sequence[Tensor], progress: Progress) -> list[dict]:
    """Milliseconds of backbone, neck and head of each network, medians; None where there is no such part."""
    found = [{name: [] for name in PARTS} for _ in networks]
    for round_, batch in enumerate(batches):
        for i in turns(len(networks), round_):
            for name, seconds in networks[i].split(batch).items():
                found[i][name].append(1e3 * seconds)
        progress()
    return [{name: statistics.median(values) if values else None for name, values in one.items()} for one in found]


@torch.no_grad()
def count(network: Network, batches: Sequence[Tensor]) -> dict:
    """What the network ran on some batches: means over the images.

    Args:
        network: Not compiled.
        batches: All are run where the images decide how much; else one is enough.

    Returns:
        ``gmacs`` and ``mac_ratio`` (to the model without parts) of what is timed, ``measured_rate`` (fraction of active
        patch tokens; None without dispatchers) and ``executor`` (what ran the dispatched branches; None likewise).
    """
    branches = dynamic_branches(network).values()
    varies = any(getattr(branch.dispatcher.decider, 'capacity', None) is None for branch in branches)
    executors: dict[str, None] = {}
    with CostCounter(network) as counter, record_dispatch(network) as record:
        for batch in batches[: None if varies else 1]:
            network(batch)
            counter.add_images(len(batch))
            executors |= dict.fromkeys(run.executor for name in record.names for run in record.runs[name])
            record.clear()
    report = counter.report()
    what = '_backbone' if network.part == 'backbone' else ''
    gmacs, dense = report[f'gmacs{what}'], report[f'gmacs{what}_dense']
    return dict(
        gmacs=gmacs,
        mac_ratio=gmacs / dense,
        measured_rate=report.get('activation_rate'),
        executor='+'.join(sorted(executors)) or None,
    )


def _row(variant: Variant, seconds: Sequence[float], base: Sequence[float], cost: dict) -> dict:
    """What is known of a variant but its split and memory."""
    milliseconds = [1e3 * value for value in seconds]
    middle, time_ratio = statistics.median(milliseconds), ratio(seconds, base)
    saving = 1 - cost['mac_ratio']
    return dict(
        model=variant.model,
        task=task_of(variant.network.host),
        compiled=variant.compiled,
        cuda_graph=variant.cuda_graph,
        dispatch=variant.dispatch,
        keys=variant.keys,
        inference=variant.inference,
        rate=variant.rate,
        latency_ms=dict(median=middle, p5=percentile(milliseconds, 0.05), p95=percentile(milliseconds, 0.95)),
        seconds_per_pass=middle / 1e3,
        time_ratio=time_ratio,
        saving_share=(1 - time_ratio) / saving if saving > LEAST_SAVING else None,
        **cost,
    )


def _in_order(row: dict, images: Images) -> dict:
    """The row with the names and the order of docs/benchmarks.md."""
    row = row | dict(shape=list(images.shape), frames=images.frames)
    row['throughput'] = row['batch'] / row.pop('seconds_per_pass')
    return {name: row[name] for name in COLUMNS}


COLUMNS = (
    'model', 'task', 'device', 'dtype', 'batch', 'shape', 'frames', 'executor', 'compiled', 'cuda_graph', 'keys',
    'dispatch', 'inference', 'rate', 'measured_rate', 'latency_ms', 'throughput', 'gmacs', 'mac_ratio', 'time_ratio',
    'saving_share', 'split_ms', 'peak_memory_mb',
)  # fmt: skip


def task_of(host) -> str:
    """``'classification'``, ``'segmentation'`` or ``'video'``."""
    if is_recognizer(host):
        return 'video'
    return 'segmentation' if getattr(host, HEADS[0], None) is not None else 'classification'


@contextmanager
def many_compiled() -> Iterator[None]:
    """Compile each shape anew, as often as is needed: else what is one variant too many ran eagerly, without a word."""
    torch._dynamo.reset()
    limits = dict(recompile_limit=RECOMPILES, accumulated_recompile_limit=RECOMPILES)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, **limits):
        yield
