"""Windows of a sliding test that overlap see the same cells: the later one may take over what the earlier one decided.

B images of H x W pixels, N tokens incl. P prefix tokens, patch tokens on a grid of rows x columns.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .branch import DynamicBranch, Rule
from .context import RULES, asked_of
from .dispatch import Dispatch
from .observe import decisions, dynamic_branches
from .part import Dispatcher
from .tokens import TokenState

UNDECIDED = -1


class WindowMemory:
    """What was decided about each pixel of some images so far, branch by branch.

    A cell takes over what was decided about its middle pixel; where nothing was, its own decision holds. So a token is
    decided once, and overlapping windows agree; where cells of two windows do not coincide, to the nearest cell. A
    share of each image is then no longer kept to.  # differs from paper: opt-in.

    Args:
        model: Its dispatched branches decide.
        image: H and W of the images that windows are cut from.
        patch: Height and width of a patch, in pixels.
    """

    def __init__(self, model: nn.Module, image: tuple[int, int], patch: tuple[int, int]):
        self._branches = dynamic_branches(model)
        self._model = model
        self._image, self._patch = image, patch
        self._decided: dict[str, Tensor] = {}  # (B, H, W) each
        self._corner = (0, 0)

    @contextmanager
    def open(self) -> Iterator['WindowMemory']:
        """Within the context windows remember; each must be told of by :meth:`move`."""
        rules = {name: partial(self._rule, name, _rule_before(branch)) for name, branch in self._branches.items()}
        with decisions(self._model, rules):
            yield self

    def move(self, top: int, left: int) -> None:
        """Say where the window of the next pass begins, in pixels."""
        self._corner = (top, left)

    def _rule(self, name: str, before: Rule | None, dispatcher: Dispatcher, x: Tensor, state: TokenState) -> Dispatch:
        """What was decided before, and else what the dispatcher, or an outer rule, decides now."""
        dispatch = dispatcher(x, state) if before is None else before(dispatcher, x, state)
        if dispatch.complete or not dispatch.patch_mask.shape[1]:
            return dispatch
        if state.owner is not None:
            raise ValueError('reuse_decisions must be False where parts make the tokens fewer, got True.')
        if name not in self._decided:
            self._decided[name] = torch.full((len(x), *self._image), UNDECIDED, dtype=torch.int8, device=x.device)
        decided = self._decided[name]
        middles = [self._middles(axis, cells, x.device) for axis, cells in enumerate(state.grid)]
        known = decided[:, middles[0][:, None], middles[1]].flatten(1).unsqueeze(-1)
        mask = torch.where(known == UNDECIDED, dispatch.patch_mask, known.to(dispatch.mask.dtype))
        self._keep(decided, mask.view(len(x), *state.grid))
        return dispatch.with_mask(F.pad(mask, (0, 0, dispatch.num_prefix_tokens, 0), value=1.0))

    def _middles(self, axis: int, cells: int, device: torch.device) -> Tensor:
        """The middle pixel of each cell along an axis; of cells that reach beyond the image the last one."""
        patch = self._patch[axis]
        middles = self._corner[axis] + patch // 2 + patch * torch.arange(cells, device=device)
        return middles.clamp(max=self._image[axis] - 1)

    def _keep(self, decided: Tensor, mask: Tensor) -> None:
        """Note a mask (B, rows, columns) for all pixels of the window that have none."""
        pixels = mask.to(decided.dtype)
        for axis, patch in enumerate(self._patch):
            pixels = pixels.repeat_interleave(patch, dim=1 + axis)
        top, left = self._corner
        window = decided[:, top : top + pixels.shape[1], left : left + pixels.shape[2]]
        pixels = pixels[:, : window.shape[1], : window.shape[2]]
        window.copy_(torch.where(window == UNDECIDED, pixels, window))


def _rule_before(branch: DynamicBranch) -> Rule | None:
    """The rule from outside that decides now."""
    rules = asked_of(RULES, branch)
    return rules[-1] if rules else None
