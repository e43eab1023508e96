"""What a user may ask the benchmark of inference for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mmdyt.core.block import DISPATCH
from mmdyt.core.branch import INFERENCE
from mmdyt.core.executors import KEYS
from mmdyt.core.options import check_choice, is_integer, is_number

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
DEVICES = ('cpu', 'cuda')
RULES = ('capacity', 'threshold')
TIMED = ('model', 'backbone')


@dataclass(frozen=True)
class BenchmarkRequest:
    """Which variants are timed, and where.

    Attributes:
        batch: Images, or views of clips, of a forward pass.
        device: ``'cpu'`` and ``'cuda'``; empty is CUDA where there is one.
        dtype: Names of :data:`DTYPES`.
        rate: Wanted activation rates, in (0, 1]; empty leaves the rule that the dispatchers have.
        rule: With ``rate``: each image has that rate (``'capacity'``), or the images have it on average
            (``'threshold'``).
        inference: Executors; empty is the config's.
        dispatch: Which branches are dispatched; empty is the config's.
        keys: Which tokens may be attended to; empty is the config's.
        rounds: Timed forward passes of each variant, >= 1.
        threads: Of torch on a CPU, >= 1.
        seed: Of random weights, of generated images, and of the order of the images.
        shape: Height and width in pixels; None is that of the test images, or what the backbone was built for.
        compiled: Whether each variant is timed under ``torch.compile``, too.
        cuda_graphs: Whether each variant is timed as one CUDA graph, too.
        part: ``'model'``, or the ``'backbone'`` with its patch embedding.

    Raises:
        ValueError: If an option is out of range, a device is missing, or it cannot compute in a dtype.
    """

    batch: Sequence[int] = (1, 8)
    device: Sequence[str] = ()
    dtype: Sequence[str] = ('fp32',)
    rate: Sequence[float] = ()
    rule: str = RULES[0]
    inference: Sequence[str] = ()
    dispatch: Sequence[str] = ()
    keys: Sequence[str] = ()
    rounds: int = 20
    threads: int = 1
    seed: int = 0
    shape: Sequence[int] | None = None
    compiled: bool = False
    cuda_graphs: bool = False
    part: str = TIMED[0]

    def __post_init__(self):
        for name in ('batch', 'device', 'dtype', 'rate', 'inference', 'dispatch', 'keys'):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f'{name} must hold different values, got {list(given)}.')
        for name, values in dict(batch=self.batch, rounds=[self.rounds], threads=[self.threads]).items():
            if bad := [value for value in values if not (is_integer(value) and value >= 1)]:
                raise ValueError(f'{name} must be at least 1, got {bad[0]!r}.')
        if not (is_integer(self.seed) and self.seed >= 0):
            raise ValueError(f'seed must be at least 0, got {self.seed!r}.')
        if self.shape is not None and min(self.shape) < 1:
            raise ValueError(f'shape must hold two positive sizes in pixels, got {list(self.shape)}.')
        self._check_words()
        for rate in self.rate:
            if not (is_number(rate) and 0 < rate <= 1):
                raise ValueError(f'rate must lie in (0, 1], got {rate!r}. Rates are fractions, not percent.')
        if self.cuda_graphs and 'cpu' in self.devices():
            raise ValueError('cuda_graphs must be left out on a CPU, got it for cpu.')
        for device in self.devices():
            for dtype in self.dtype:
                check_computes(device, dtype)

    def _check_words(self) -> None:
        """Refuse words that are none, and those that do not go together."""
        check_choice(RULES, rule=self.rule)
        check_choice(TIMED, part=self.part)
        known = dict(device=DEVICES, dtype=tuple(DTYPES), inference=INFERENCE, dispatch=tuple(DISPATCH), keys=KEYS)
        for name, words in known.items():
            for word in getattr(self, name):
                check_choice(words, **{name: word})
        if 'fixed' in self.inference and self.rate and self.rule == 'threshold':
            raise ValueError("inference must not be 'fixed' with rule='threshold', which knows no number of tokens.")
        if list(self.keys) == ['all'] and list(self.dispatch) == ['mlp']:
            raise ValueError("keys must be 'active' with dispatch='mlp', whose tokens attend to nothing, got 'all'.")

    def devices(self) -> Sequence[str]:
        """Where variants are timed."""
        return self.device or ('cuda' if torch.cuda.is_available() else 'cpu',)


def check_computes(device: str, dtype: str) -> None:
    """Refuse a device that is missing, or that has not the operators of a Vision Transformer in a dtype.

    Raises:
        ValueError: With what torch says.
    """
    if device == 'cuda' and not torch.cuda.is_available():
        raise ValueError("device must be 'cpu' where torch finds no CUDA device, got 'cuda'.")
    try:
        with torch.no_grad():
            image = torch.ones(1, 3, 16, 16, device=device, dtype=DTYPES[dtype])
            tokens = F.conv2d(image, image.expand(8, -1, -1, -1)[:, :, :8, :8], stride=8).flatten(2).transpose(1, 2)
            tokens = F.gelu(F.linear(F.layer_norm(tokens, (8,)), tokens[0, :1].expand(8, -1)))
            F.scaled_dot_product_attention(tokens[:, None], tokens[:, None], tokens[:, None])
    except (NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f'dtype must be one that {device} computes in, got {dtype!r}: {reason}') from error
