"""Logits that are no numbers decide nothing: whose they were."""

from torch import Tensor


class BrokenLogits:
    """Remembers which samples had logits that are not finite, and in which branches."""

    def __init__(self):
        self.samples: list[str] = []
        self.branches: dict[str, None] = {}
        self._places: set[tuple[int, int]] = set()  # in the present batch: place in a forward pass, and its size

    def look(self, branch: str, logits: Tensor | None) -> None:
        """See the logits of one forward pass, (B, M, 1); a rule from outside has none."""
        if logits is None or logits.isfinite().all():
            return
        self.branches[branch] = None
        broken = (~logits.isfinite()).flatten(1).any(dim=1).nonzero().flatten()
        self._places |= {(place, len(logits)) for place in broken.tolist()}

    def name(self, names: list[str]) -> None:
        """Say to which samples the forward passes belonged; the windows, views and frames of one stand together."""
        self.samples += [names[i] for i in sorted({place * len(names) // size for place, size in self._places})]
        self._places.clear()
