"""A rate or a cost that inference keeps exactly, on every input, without calibration data.

Each branch takes its best tokens of each image, as many as its share says: a capacity. No score need be known before.
"""

import math
from collections import Counter

import torch.nn as nn

from mmdyt.core.executors import runs_all
from mmdyt.core.fit.calibrate import token_dispatchers
from mmdyt.core.fit.shares import STEPS, moved_shares
from mmdyt.core.losses import check_rate
from mmdyt.core.observe import dynamic_branches
from mmdyt.engine.costs import GIGA, CostCounter


class RateControl:
    """Sets what the dispatchers of a host model run, and gives back what the checkpoint says.

    Args:
        host: A host model, without a wrapper.
    """

    def __init__(self, host: nn.Module):
        self._host = host
        self._own = {name: branch.dispatcher.decider for name, branch in dynamic_branches(host.backbone).items()}
        self._own = {name: (one, getattr(one, 'capacity', None)) for name, one in self._own.items() if one.adjustable}
        self._passes: dict[tuple, tuple[Counter, float]] = {}

    def check(self) -> None:
        """Refuse a model whose rate cannot be set.

        Raises:
            ValueError: If it has no dispatcher with a threshold, or one that decides about whole images.
        """
        for name, dispatcher in token_dispatchers(self._host.backbone).items():
            if not dispatcher.per_token:
                raise ValueError(
                    f'rate and gmacs must be left to the checkpoint with the {type(dispatcher).__name__} of {name}, '
                    'which decides about whole images, got one of them.'
                )

    @property
    def equal(self) -> bool:
        """Whether all branches get the same share, since the checkpoint says nothing of shares."""
        return all(capacity is None for _, capacity in self._own.values())

    def reset(self) -> None:
        """Decide as the checkpoint says."""
        for dispatcher, capacity in self._own.values():
            dispatcher.set_rule(capacity=capacity)

    def set_rate(self, rate: float) -> None:
        """Let the mean over the branches of the activation rates be this one, on every input, to the nearest token."""
        for name, share in self.shares(rate).items():
            self._own[name][0].set_rule(capacity=share)

    def shares(self, rate: float) -> dict[str, float]:
        """Share of active tokens of each branch.

        Where the checkpoint has capacities (``tools/calibrate.py --per-image``, ``--method evidence``), all are moved
        alike, by one offset of their logits, so that they keep their order and stay in [0, 1]. Else all are equal.

        Args:
            rate: Their mean, in (0, 1].
        """
        check_rate(rate)
        own = {name: capacity for name, (_, capacity) in self._own.items() if capacity is not None}
        found = dict.fromkeys(self._own, float(rate))  # also of branches that no patch token reached in a calibration
        if own and rate < 1:
            found |= moved_shares(own, rate)
        return found

    def set_gmacs(self, gmacs: float, key: tuple, forward) -> None:
        """Set the highest rate with which an input costs at most so much, in closed form.

        Args:
            gmacs: Neck and head included, all windows and views together; 10^9 multiply-adds.
            key: What inputs have in common that cost the same at the same rate.
            forward: Runs one such input; called once for each key.

        Raises:
            ValueError: If no rate gives that.
        """
        if key not in self._passes:
            self._passes[key] = self._watched(forward)
        passes, rest = self._passes[key]
        lowest, highest = (self._gmacs(passes, rest, rate) for rate in (1e-9, 1.0))
        if gmacs < lowest:
            raise ValueError(
                f'gmacs must be at least {lowest:.4g}, where no patch token is active, for this input, got {gmacs:g}. '
                f'With all it costs {highest:.4g}.'
            )
        low, high = (1.0, 1.0) if gmacs >= highest else (1e-9, 1.0)
        while high - low > 2**-STEPS and low < 1:
            middle = (low + high) / 2
            low, high = (middle, high) if self._gmacs(passes, rest, middle) <= gmacs else (low, middle)
        self.set_rate(low)

    def _watched(self, forward) -> tuple[Counter, float]:
        """Sizes of the passes of the backbone that an input takes, and what is not the backbone's cost of it."""
        sizes: Counter = Counter()

        def count(backbone: nn.Module, args: tuple, features) -> None:
            batch, _, *frames, height, width = args[0].shape
            sizes[height, width] += batch * math.prod(frames)

        handle = self._host.backbone.register_forward_hook(count)
        try:
            with CostCounter(self._host) as counter:
                forward()
                counter.add_images(1)
                line = counter.take().lines()[0]
        finally:
            handle.remove()
        return sizes, line['gmacs_neck'] + line['gmacs_head']

    def _gmacs(self, passes: Counter, rest: float, rate: float) -> float:
        """Cost of all passes when each branch has its share; padding counts as if it were none."""
        backbone, shares, total = self._host.backbone, self.shares(rate), 0.0
        branches, prefixes = dynamic_branches(backbone), backbone.prefixes()
        for size, number in passes.items():
            patches, active = backbone.patches_of(*size), {}
            for name, share in shares.items():
                branch, prefix = branches[name], prefixes[int(name.split('.')[1])]
                ran, tokens = prefix + round(share * patches[name]), prefix + patches[name]
                if branch.inference != 'masked' and not runs_all(ran, tokens, branch.break_even):
                    active[name] = ran
            total += number * float(backbone.macs(*size, active))
        return rest + total / GIGA
