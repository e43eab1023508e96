"""From which share of active tokens on skipping takes longer than running all of them."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from mmdyt.core.observe import record_dispatch
from mmdyt.engine.benchmark.images import Images
from mmdyt.engine.benchmark.measure import WARM_UP, placed, ratio, take_rounds
from mmdyt.engine.benchmark.request import BenchmarkRequest
from mmdyt.engine.benchmark.variants import Build, Network, Variant, build_variants

RATES = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@torch.no_grad()
def break_even(
    build: Build, request: BenchmarkRequest, images: Images, trained: bool, progress: Callable[[], None] = lambda: None
) -> dict:
    """Time the dispatched model at several rates beside the same model in which every token runs each branch.

    The latter is what a backbone with ``break_even`` does instead: its dispatchers are asked all the same.

    Args:
        build: As of :func:`~mmdyt.engine.benchmark.variants.build_variants`.
        request: Its devices, dtypes, batches, rounds and rule count, and the first of what else it asks for.
        images: Other ones in each round.
        trained: Whether the gates are a checkpoint's.
        progress: Called after each round.

    Returns:
        ``break_even``, the least of ``settings``, which hold one for each device, dtype and batch, with the ``shares``
        of active tokens and the ``time_ratios`` that tell it.
    """
    request = replace(request, rate=RATES, compiled=False, **{n: getattr(request, n)[:1] for n in ('dispatch', 'keys')})
    variants = _variants(build, request, images, trained)
    settings = []
    for device, dtype, found in placed(variants, request):
        for batch in request.batch:
            networks = [variant.network for variant in found]
            first = next(networks[0].parameters())
            batches = images.deal(batch, WARM_UP + request.rounds, request.seed, like=first)
            base, *seconds = take_rounds(networks, batches, WARM_UP, progress)
            shares = [active_share(network, batches[-1]) for network in networks[1:]]
            ratios = [ratio(took, base) for took in seconds]
            about = dict(device=device, dtype=dtype, batch=batch, shape=list(images.shape))
            where = dict(dispatch=found[1].dispatch, keys=found[1].keys, break_even=crossing(shares, ratios))
            settings.append(about | where | dict(shares=shares, time_ratios=ratios))
    return dict(break_even=min(one['break_even'] for one in settings), settings=settings)


def count_break_even_rounds(request: BenchmarkRequest) -> int:
    """How often :func:`break_even` calls ``progress``."""
    return (WARM_UP + request.rounds) * len(request.devices()) * len(request.dtype) * len(request.batch)


def _variants(build: Build, request: BenchmarkRequest, images: Images, trained: bool) -> list[Variant]:
    """The model in which all tokens run, and the dispatched one at each rate."""
    skipping = next((word for word in request.inference if word != 'masked'), 'auto')
    masked, skips = (replace(request, inference=(word,)) for word in ('masked', skipping))
    base = [one for one in build_variants(build, replace(masked, rate=RATES[:1]), images.pool, trained) if one.rate]
    found = base + [one for one in build_variants(build, skips, images.pool, trained) if one.rate]
    for variant in found:
        variant.network.host.backbone.set_break_even(None)
    return found


def active_share(network: Network, batch: torch.Tensor) -> float:
    """Share of the tokens, prefix included, that run the branches that decide: what ``break_even`` is compared with."""
    with record_dispatch(network) as record:
        network(batch)
    decided = [d for d in record.flat() if not d.complete and d.patch_mask.shape[1]]
    masks = [dispatch.mask.float().mean().item() for dispatch in decided]
    return sum(masks) / len(masks)


def crossing(shares: Sequence[float], ratios: Sequence[float]) -> float:
    """The share at which the ratio first reaches 1, linear between neighbours.

    Args:
        shares: Of active tokens, rising.
        ratios: Of the time of skipping to that of running all.

    Returns:
        In (0, 1]; the first share where skipping never pays, and 1 where it always does.
    """
    if ratios[0] >= 1:
        return shares[0]
    pairs = list(zip(shares, ratios, strict=True))
    for (low, before), (high, after) in zip(pairs, pairs[1:], strict=False):
        if after >= 1:
            return low + (high - low) * (1 - before) / (after - before)
    return 1.0
