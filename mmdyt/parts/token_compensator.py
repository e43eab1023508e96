"""A network tuned at one degree of token merging runs at another. h rank of a group, C_out, C_in widths of a linear."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmdyt.core.options import check_probability, is_integer, is_number
from mmdyt.core.part import Rewrite
from mmdyt.parts.tome import ToMe

GROUPS = 16  # one for each step from a degree to the next: degrees are 0 to 16


class TokenCompensator(Rewrite):
    """``W' = W + s sign(b - a) sum B_i A_i``, the sum over min(a, b) < i <= max(a, b): the bridge between two degrees.

    A degree is how many pairs of tokens merge in each block (:class:`~mmdyt.parts.tome.ToMe`, constant schedule). A
    network that was tuned at degree a loses accuracy at another one, b; the bridge makes up for some of it. It is
    trained once for a frozen network (``tools/train_compensator.py``), and then serves whatever is tuned on that: no
    task trains it. For equal degrees nothing is added, and the way back is minus the way there.

    Source: Token Compensator (Jie et al., ECCV 2024, arXiv 2408.06798).

    Args:
        out_features: Rows of W, or of the part of it that is rewritten.
        in_features: Columns of W.
        run_at: b, the degree of the merging, 0 to 16.
        tuned_at: a, the degree at which the network was tuned, 0 to 16; None is ``run_at``.
        rank: h >= 1 of each of the 16 groups.
        scale: s; the paper tests .05 to .15.
        dropout: On what A reads in training, in [0, 1).
        checkpoint: File of a trained bridge. Checkpoints of a model then neither hold nor change it. None trains one.

    Shape:
        (..., in_features) -> (..., out_features).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If an argument is out of range, or the file holds no bridge of this network.
    """

    word = 'compensator'
    targets = ('attn.q', 'attn.v')

    def __init__(
        self,
        out_features: int,
        in_features: int,
        run_at: int = 0,
        tuned_at: int | None = None,
        rank: int = 2,
        scale: float = 0.1,
        dropout: float = 0.1,
        checkpoint: str | None = None,
    ):
        super().__init__(out_features, in_features)
        if not (is_integer(rank) and rank >= 1):
            raise ValueError(f'rank must be a positive integer, got {rank!r}.')
        check_probability(dropout=dropout)
        if not is_number(scale):
            raise ValueError(f'scale must be a finite number, got {scale!r}.')
        if not (checkpoint is None or isinstance(checkpoint, str)):
            raise ValueError(f'checkpoint must name a file or be None, got {checkpoint!r}.')
        self.rank, self.scale, self.checkpoint = rank, scale, checkpoint
        self.place: str | None = None  # in the network, once it is attached: ``layers.0.attn.q``
        self.down = nn.Parameter(torch.empty(GROUPS * rank, in_features))  # A_1 ... A_16
        self.up = nn.Parameter(torch.empty(out_features, GROUPS * rank))  # B_1 ... B_16
        self.dropout = nn.Dropout(dropout if checkpoint is None else 0.0)  # one from a file is not trained
        self.set_degrees(run_at if tuned_at is None else tuned_at, run_at)
        self.reset_parameters()

    @classmethod
    def add_to(cls, block: Any, tuned_at: int | None = None, checkpoint: str | None = None, **options) -> None:
        """Attach one to queries and values of a block, to run at the degree of its ToMe.

        Args:
            block: Of any network.
            tuned_at: Of the constructor.
            checkpoint: Of the constructor.
            **options: Of the constructor, and those of :meth:`~mmdyt.core.part.Rewrite.add_to`.

        Raises:
            ValueError: If nothing merges there at a constant degree, or degrees differ without a trained bridge.
        """
        if hasattr(block, 'steps'):  # what is outside the blocks has no queries
            merging = [part.degree for part in block.steps('mid') if isinstance(part, ToMe)]
            if merging in ([], [None]):
                raise ValueError(
                    f"parts must hold a ToMe with schedule='constant', scope='block' before a {cls.__name__}, got "
                    f'{"another" if merging else "none"}.'
                )
            options['run_at'] = check_degree('r', merging[0])
            if checkpoint is None and tuned_at not in (None, merging[0]):
                raise ValueError(
                    f'checkpoint must name a trained bridge from tuned_at={tuned_at!r} to r={merging[0]}, got None. '
                    'tools/train_compensator.py trains one.'
                )
        super().add_to(block, tuned_at=tuned_at, checkpoint=checkpoint, **options)

    def attach(self, block: Any, on: str) -> None:
        """Take the room around a frozen module, and the weights that the file has for it."""
        super().attach(block, on)
        self.place = f'layers.{block.place.index}.{on}'
        self._read()

    def reset_parameters(self) -> None:
        """Kaiming-uniform A, zero B; or those of the file."""
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        nn.init.zeros_(self.up)
        self._read()

    def tuned_parameters(self) -> Iterable[nn.Parameter]:
        """None: tasks leave it as it is."""
        return ()

    def set_degrees(self, tuned_at: int, run_at: int) -> None:
        """Bridge from degree a to degree b.

        Raises:
            ValueError: If one is no degree.
        """
        run_at, tuned_at = check_degree('run_at', run_at), check_degree('tuned_at', tuned_at)
        self.tuned_at, self.run_at = tuned_at, run_at

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``W x + b + s sign(b - a) sum B_i A_i x``."""
        out = F.linear(x, weight, bias)
        if self.tuned_at == self.run_at:
            return out
        groups = self._groups()
        return out + self._factor() * F.linear(F.linear(self.dropout(x), self.down[groups]), self.up[:, groups])

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``W + s sign(b - a) sum B_i A_i``, and the bias as it is."""
        return weight + self.update().to(weight), bias

    def update(self) -> Tensor:
        """What the bridge adds to the weight, (C_out, C_in)."""
        groups = self._groups()
        return self._factor() * self.up[:, groups] @ self.down[groups]

    def macs_per_token(self) -> int:
        """Multiply-adds per token until it is merged: ``h |b - a| (in + out)``."""
        return self.rank * abs(self.run_at - self.tuned_at) * (self.in_features + self.out_features)

    def extra_repr(self) -> str:
        """Show the options in ``print(model)``."""
        return f'tuned_at={self.tuned_at}, run_at={self.run_at}, rank={self.rank}, scale={self.scale}'

    def _groups(self) -> slice:
        """Rows of A, and columns of B, between the two degrees."""
        low, high = sorted((self.tuned_at, self.run_at))
        return slice(low * self.rank, high * self.rank)

    def _factor(self) -> float:
        """``s sign(b - a)``."""
        return self.scale if self.run_at > self.tuned_at else -self.scale

    @torch.no_grad()
    def _read(self) -> None:
        """Take over the weights of the file, where there is one and the place is known."""
        if self.checkpoint is None or self.place is None:
            return
        tensors = read_bridge(self.checkpoint)
        for name, parameter in (('down', self.down), ('up', self.up)):
            found = tensors.get(f'{self.place}.{name}')
            if found is None or found.shape != parameter.shape or not found.isfinite().all():
                kind = 'none' if found is None else f'{tuple(found.shape)}, or not finite'
                raise ValueError(
                    f'checkpoint must hold a bridge of this network and rank, {self.place}.{name} of shape '
                    f'{tuple(parameter.shape)}, got {kind} in {self.checkpoint}.'
                )
            parameter.copy_(found)

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        """Nothing of a bridge that a file has."""
        if self.checkpoint is None:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args) -> None:
        """As above: a checkpoint of a task changes it not, and need not have it."""
        if self.checkpoint is None:
            super()._load_from_state_dict(*args)


def check_degree(name: str, degree: int) -> int:
    """A degree of merging, as it is.

    Raises:
        ValueError: If it is none.
    """
    if not (is_integer(degree) and 0 <= degree <= GROUPS):
        raise ValueError(f'{name} must be a number of pairs from 0 to {GROUPS} with a bridge, got {degree!r}.')
    return degree


def read_bridge(checkpoint: str) -> dict[str, Tensor]:
    """Tensors of a file, by their place.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it holds no bridge, or is broken.
    """
    try:
        content = torch.load(checkpoint, map_location='cpu', weights_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f'checkpoint must name an existing file, got {checkpoint}.') from error
    except Exception as error:
        raise ValueError(
            f'checkpoint must be a file that tools/train_compensator.py wrote, got {checkpoint}: it is broken '
            f'({type(error).__name__}).'
        ) from error
    tensors = content.get('state_dict') if isinstance(content, dict) and 'bridge' in content else None
    if not (isinstance(tensors, dict) and all(isinstance(value, Tensor) for value in tensors.values())):
        raise ValueError(f'checkpoint must be a file that tools/train_compensator.py wrote, got {checkpoint}.')
    return tensors
