"""A method does not change a Vision Transformer: it adds parts to it. The four kinds of parts say where they act.

B images, N tokens, C width. A part is a child of ``dynamic.<site>`` of its block, under its own ``word``.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from .dispatch import Dispatch
from .macs import Count
from .reduction import Plan
from .tokens import TokenState

PLACES = ('parallel', 'inactive', 'serial')
FILLED_IN = (
    'dim',
    'num_prefix_tokens',
    'out_features',
    'in_features',
    'patch_values',
    'index',
    'depth',
    'pairs',
    'head_dim',
    'run_at',
)
STEPS = ('enter', 'mid', 'around', 'leave')


class Part(nn.Module):
    """What a method adds to a block of a frozen network.

    It declares its parameters, their start values and its cost; nobody else asks for its name or type.

    Attributes:
        word: Under which name models hold it.
        reads_all: Whether what it gives one token depends on other tokens, so that none may be left out.
    """

    word: ClassVar[str]
    reads_all: ClassVar[bool] = False

    @classmethod
    def add_to(cls, block: Any, **options) -> None:
        """Build what a block needs of this part, and attach it.

        Args:
            block: A :class:`~mmdyt.core.block.Block`; the widths come from it.
            **options: Where it acts, and arguments of the constructor.
        """
        raise TypeError(f'{cls.__name__} must be a Delta, a Rewrite, a TokenOp or a Dispatcher, to know its room.')

    def reset_parameters(self) -> None:
        """Draw the start values anew; a fresh part leaves the network (nearly) as it is."""

    def tuned_parameters(self) -> Iterable[nn.Parameter]:
        """What training learns; by default all parameters."""
        return self.parameters()

    def macs_per_token(self) -> int:
        """Multiply-adds for each token that it sees."""
        return 0

    def check(self, before: 'Sequence[Part]') -> None:
        """Refuse to act behind these parts of earlier layers, and operations of its own, in network order.

        Raises:
            ValueError: If that cannot work.
        """

    def carried(self) -> int:
        """How many tensors, laid out as the tokens, earlier parts of its kind have left for this one and later ones."""
        return 0

    def macs_per_image(self) -> int:
        """Multiply-adds for each image, beside those of its tokens."""
        return 0


class Delta(Part):
    """Adds an update to the tokens: ``forward(x, state)``, (B, N, C) -> (B, N, C).

    Attributes:
        place: ``'parallel'`` to a branch, reading its raw input, on every token; ``'inactive'``, the same for the
            tokens that skip the branch, which may be one vector (C,); or ``'serial'``, behind the branch's residual
            connection, on every token.
    """

    place: ClassVar[str] = 'parallel'
    takes_mean: ClassVar[bool] = False  # whether ``set_mean`` says what inactive tokens miss on average

    def add_update(self, out: Tensor, x: Tensor, state: TokenState) -> Tensor:
        """``out`` plus the update of ``x``, (B, N, C) each; a part may give that in one go."""
        return out + self(x, state)

    def alone(self, x: Tensor, state: TokenState) -> Tensor:
        """The update of cells (B, n, C) of the image whose token is no more; for parts that read one token each."""
        return self(x, state)

    def macs_alone(self) -> int:
        """Multiply-adds for each of them."""
        return self.macs_per_token()

    @classmethod
    def add_to(cls, block: Any, site: str | None = None, **options) -> None:
        """Attach one, ``dim`` filled in, at ``site``: ``'attn'``, ``'mlp'`` or ``'layer'``."""
        cls(dim=block.place.dim, **options).attach(block, site)

    def attach(self, block: Any, site: str | None = None) -> None:
        """Take the room beside a branch; None is the MLP's, or the whole layer's where that is dispatched."""
        block.branch(site or ('layer' if block.dispatch == 'layer' else 'mlp')).add(self)


class Dispatcher(Part):
    """Decides which tokens run a branch: ``forward(x, state)``, (B, N, C) -> :class:`~mmdyt.core.dispatch.Dispatch`."""

    word = 'dispatcher'
    adjustable: ClassVar[bool] = False  # whether it has a gate, and a rule that can be set: see TokenDispatcher
    per_token: ClassVar[bool] = True  # whether the tokens of an image are decided one by one
    num_prefix_tokens: int  # leading tokens of the host that are always active
    noise: bool = False  # whether training samples, and reads no rule
    rate: float | None = None  # of the active patch tokens, where it is fixed
    needs_grid: ClassVar[bool] = False  # whether it decides by where tokens lie, so that none may be missing
    stops: ClassVar[bool] = False  # whether the parts beside the branch skip inactive tokens, too
    chained: ClassVar[bool] = False  # whether every layer behind the first that has one must have one, too

    def __init__(self):
        super().__init__()
        self.key = id(self)  # of its decisions within a pass; replicas on other devices share it

    @property
    def decider(self) -> 'Dispatcher':
        """The dispatcher whose decision this is: itself, or that of an earlier layer."""
        return self

    @classmethod
    def add_to(cls, block: Any, site: str | None = None, **options) -> None:
        """Attach one for each dispatched branch, or for that at ``site``; width and prefix are filled in."""
        for name in [site] if site else block.sites:
            cls(dim=block.place.dim, num_prefix_tokens=block.place.prefix, **options).attach(block, name)

    def follow(self, before: 'Dispatcher | None') -> None:
        """Be told who decides about the same branch in the nearest layer before that has a dispatcher; None is nobody.

        Raises:
            ValueError: If it cannot work behind that.
        """

    def losses(self, decided: Sequence[Dispatch]) -> dict[str, Tensor]:
        """What training asks of decisions beside their rate, and numbers for the log; of the last layer's only.

        Args:
            decided: What those of its kind decided in a pass about the same branch of all layers, in network order.
        """
        return {}

    def attach(self, block: Any, site: str) -> None:
        """Take the room in front of a branch."""
        block.branch(site).add(self)

    def check(self, before: 'Sequence[Part]') -> None:
        """Refuse to decide by a grid of which tokens are missing."""
        for part in before:
            if self.needs_grid and isinstance(part, TokenOp) and part.reduces:
                raise ValueError(
                    f'dispatcher must not be a {type(self).__name__} behind a {type(part).__name__}, which leaves no '
                    'grid, got one.'
                )

    def sample(self, x: Tensor, state: TokenState | None = None) -> Dispatch:
        """Decide as training does, whatever the mode; what never samples decides as ever."""
        return self(x, state)


class Rewrite(Part):
    """Rewrites a frozen linear or norm: ``forward(x, weight, bias)`` runs it, with what it adds.

    Args:
        out_features: Width of what the frozen module gives, or of the rows of it that are rewritten.
        in_features: Width of what it reads.

    Attributes:
        targets: What it rewrites where a config does not say it.
    """

    targets: ClassVar[tuple[str, ...]] = ('linears',)
    only_linears: ClassVar[bool] = True

    def __init__(self, out_features: int, in_features: int):
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features
        self._plain: Callable[..., Tensor] = F.linear

    @classmethod
    def add_to(cls, block: Any, on: str | Iterable[str] | None = None, rows: str | None = None, **options) -> None:
        """Attach one to each frozen module, widths filled in.

        Args:
            block: Its modules are rewritten.
            on: Names such as ``'attn.qkv'``, ``'mlp.fc1'``, ``'attn.norm'``; ``'linears'`` is all linear layers
                (queries, keys and values each on their own), ``'all'`` the norms and the patch embedding too. None is
                what the method is known for.
            rows: Of ``'attn.qkv'``, some of ``'q'``, ``'k'``, ``'v'``, each on its own: ``'qv'``. None is one for all.
            **options: Of the constructor.
        """
        if on is None:
            on = cls.targets if rows is None else 'attn.qkv'
        for name in block.names(on, rows):
            out_features, in_features = block.widths(name)
            cls(out_features, in_features, **options).attach(block, name)

    def attach(self, block: Any, on: str) -> None:
        """Take the room around a frozen module."""
        block.rewrite(on, self)

    def wrap(self, module: nn.Module) -> None:
        """Be told which module is rewritten, to run it.

        Raises:
            ValueError: If it is none that this part can rewrite.
        """
        if isinstance(module, nn.Linear):
            return
        if self.only_linears:
            raise ValueError(f'on must name linear layers for {type(self).__name__}, got a {type(module).__name__}.')
        self._plain = _Plain(module)

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the frozen module gives with this weight and bias."""
        return self._plain(x, weight, bias)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with which the frozen module alone does what it and this part do.

        Raises:
            ValueError: If there is no such weight.
        """
        raise ValueError(f'{type(self).__name__} must stay beside the network: it has no merged form.')

    @classmethod
    def merges(cls) -> bool:
        """Whether there is a merged form."""
        return cls.merged is not Rewrite.merged


class _Plain:
    """Runs a module, which it does not own, with another weight and bias."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        tensors = dict(weight=weight) | ({} if bias is None else dict(bias=bias))
        return functional_call(self.module, tensors, (x,))


class TokenOp(Part):
    """Changes the sequence: ``forward(x, state)``, (B, N, C) -> (B, N', C), and tells the state what it did.

    Attributes:
        step: When in a block it acts: ``'enter'``, ``'mid'`` (between attention and MLP), ``'around'`` (the MLP:
            see :meth:`plan`) or ``'leave'``.
        reads_attention: Whether it reads queries and keys of the attention before it, in the state.
        reduces: Whether it makes the patch tokens fewer for the blocks after it.
        leaves: Whether some of them then do not go on under their own name, nor as the mean of what they stand for.
        drops: Whether some of them then have no part in any token.
    """

    step: ClassVar[str] = 'enter'
    reads_attention: ClassVar[bool] = False
    reduces: bool = False
    leaves: ClassVar[bool] = False
    drops: bool = False

    @classmethod
    def add_to(cls, block: Any, **options) -> None:
        """Attach one, ``dim`` filled in."""
        cls(dim=block.place.dim, **options).attach(block)

    def prompts(self) -> int:
        """Tokens that it keeps in the sequence beside the patches and the host's prefix."""
        return 0

    def plan(self, x: Tensor, state: TokenState) -> Plan | None:
        """At the step ``'around'``: how tokens (B, N, C) become fewer for the MLP, and are as many again behind it.

        The update of a token after the plan is that of all that it is made of; None leaves them as they are.
        """
        return None

    def rows(self, patches: int, prefix: int) -> int:
        """At the step ``'around'``: for how many of M patch tokens the MLP runs."""
        return patches

    def patches_after(self, patches: int, prefix: int) -> int:
        """How many of M patch tokens are left behind ``prefix`` others."""
        return patches

    def macs(self, tokens: Count, prefix: int, carried: int = 0) -> Count:
        """Multiply-adds for an image.

        Args:
            tokens: N.
            prefix: Of these, no patches.
            carried: How many tensors, laid out as the tokens, become fewer with them.
        """
        return 0

    def attach(self, block: Any) -> None:
        """Take the room at its step of the block."""
        block.add_step(self)


def parts(model: nn.Module) -> Iterator[Part]:
    """All parts of a model, in network order."""
    return (module for module in model.modules() if isinstance(module, Part))
