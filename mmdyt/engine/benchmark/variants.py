"""The variants of a model that are timed beside each other, on the same frozen weights."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from time import perf_counter

import torch
import torch.nn as nn
from torch import Tensor

from mmdyt.core.fit.calibrate import calibrate, token_dispatchers
from mmdyt.core.fit.request import CalibrationRequest
from mmdyt.core.observe import dynamic_branches
from mmdyt.core.part import Dispatcher
from mmdyt.core.part import parts as parts_of
from mmdyt.engine.benchmark.request import BenchmarkRequest
from mmdyt.engine.host import HEADS, is_recognizer

DENSE = dict(adapter=None, dispatcher=None, substitute=None, parts=None, tuned=None)
COMPLETE = dict(dispatcher=None, substitute=None)
PARTS = ('backbone', 'neck', 'head')
CALIBRATED = 32  # images, or frames of views

Build = Callable[..., nn.Module]


class Network(nn.Module):
    """What is timed of a host model: from normalised pixels to raw scores, or to the features of the backbone.

    Left out are the data preprocessor before it, and behind it what makes data samples: softmax, resized score maps.

    Args:
        host: A model of mmpretrain, mmseg or mmaction2.
        part: ``'model'`` or ``'backbone'``.

    Shape:
        (B, 3, H, W), or views of clips (B, 3, T, H, W).
    """

    def __init__(self, host: nn.Module, part: str = 'model'):
        super().__init__()
        self.host = host.eval()
        self.part = part

    def steps(self) -> dict[str, nn.Module]:
        """The modules that run one after the other, of :data:`PARTS`."""
        found = dict(backbone=self.host.backbone)
        if self.part == 'model':
            found['neck'] = getattr(self.host, 'neck', None)
            found['head'] = next((head for name in HEADS if (head := getattr(self.host, name, None))), None)
        return {name: module for name, module in found.items() if module is not None}

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        for name, module in self.steps().items():
            x = self._run(name, module, x)
        return x

    def split(self, x: Tensor) -> dict[str, float]:
        """Seconds of each step; a GPU is waited for between them, which a pass as a whole does not."""
        seconds = {}
        for name, module in self.steps().items():
            wait(x)
            start = perf_counter()
            out = self._run(name, module, x)
            wait(x)
            seconds[name] = perf_counter() - start
            x = out
        return seconds

    def _run(self, name: str, module: nn.Module, x):
        """One step; recognizers hand on one level, and their necks return losses, too."""
        out = module(x)
        if is_recognizer(self.host):
            return out[0] if name in ('backbone', 'neck') else out
        return out

    def twin(self) -> 'Network':
        """The same network with the same parameters, and with buffers and rules of its own."""
        return copy.deepcopy(self, {id(parameter): parameter for parameter in self.parameters()})

    def compiled(self) -> 'Network':
        """A twin whose steps each are compiled."""
        twin = self.twin()
        for module in twin.steps().values():
            module.compile()
        return twin

    def cast(self, device: str, dtype: torch.dtype) -> 'Network':
        """Move to a device and a dtype; dispatchers stay in fp32, in which they score under any autocast."""
        dispatchers = [part for part in parts_of(self) if isinstance(part, Dispatcher)]
        states = [copy.deepcopy(part.state_dict()) for part in dispatchers]
        self.to(device, dtype)
        for part, state in zip(dispatchers, states, strict=True):
            part.to(torch.float32).load_state_dict(state)
        return self


@dataclass
class Variant:
    """One network that is timed, and what it is.

    Attributes:
        model: ``'dense'``, ``'adapter'`` or ``'dyt'``.
        network: On any device.
        dispatch: Dispatched branches; None without a dispatcher, as are the next ones.
        keys: Which tokens may be attended to.
        inference: The executor that was asked for.
        rate: The rate that was asked for; None keeps the model's own rule.
        compiled: Whether it is the one under ``torch.compile``.
        cuda_graph: Whether it is replayed from a CUDA graph.
    """

    model: str
    network: Network
    dispatch: str | None = None
    keys: str | None = None
    inference: str | None = None
    rate: float | None = None
    compiled: bool = False
    cuda_graph: bool = False

    @property
    def mode(self) -> tuple[bool, bool]:
        """How it is run: it is measured by the dense model that is run so, too."""
        return self.compiled, self.cuda_graph

    @property
    def name(self) -> str:
        """For people."""
        words = [self.model, self.dispatch, self.keys == 'all' and 'keys=all', self.inference]
        words += [self.rate and f'rate={self.rate:g}', self.compiled and 'compiled', self.cuda_graph and 'graph']
        return ' '.join(word for word in words if word)


def build_variants(build: Build, request: BenchmarkRequest, pool: Tensor, trained: bool) -> list[Variant]:
    """All variants that were asked for, in fp32, sharing the parameters of one model.

    Args:
        build: Gives the host model with its weights, changed by arguments of its backbone.
        request: What was asked for.
        pool: Images, (M, 3, [T,] H, W), of which the first are calibrated on.
        trained: Whether the gates are a checkpoint's.

    Raises:
        ValueError: If a variant cannot be.
    """
    frames = pool.shape[2] if pool.dim() == 5 else 1
    source, pool = build(), pool[: max(1, CALIBRATED // frames)]
    found = [
        Variant('dense', Network(like(source, build(**DENSE)), request.part)),
        Variant('adapter', Network(like(source, build(**COMPLETE)), request.part)),
    ]
    if not dynamic_branches(source):
        return found
    for host, inference in _dispatched(build, source, request):
        about = dict(dispatch=host.backbone.dispatch, keys=host.backbone.keys, inference=inference)
        network = Network(host, request.part)
        _check_fixed(host, request, inference)
        if not request.rate:
            found.append(Variant('dyt', network, **about))
        for rate in request.rate:
            found.append(Variant('dyt', with_rate(network, rate, request.rule, pool, trained), **about, rate=rate))
    return found


def like(source: nn.Module, model: nn.Module) -> nn.Module:
    """A model that shares all parameters with another that both have, and has the same buffers."""
    own = model.state_dict()
    buffers = {name: tensor for name, tensor in source.state_dict().items() if name in own}
    model.load_state_dict(buffers, strict=False)
    mine = dict(model.named_parameters())
    shared = {name: parameter for name, parameter in source.named_parameters() if name in mine}
    model.load_state_dict(shared, strict=False, assign=True)
    return model


def with_rate(network: Network, rate: float, rule: str, pool: Tensor, trained: bool) -> Network:
    """A twin whose dispatchers give a rate.

    Gates of a checkpoint share it among the layers as they do in ``tools/calibrate.py``; random ones each have it.

    Args:
        network: In fp32 on the CPU.
        rate: In (0, 1].
        rule: ``'capacity'`` or ``'threshold'``.
        pool: Images to calibrate on.
        trained: Whether the gates were trained.

    Raises:
        ValueError: If no dispatcher can be set to a rate, or not by the rule.
    """
    network = network.twin()
    dispatchers = token_dispatchers(network)
    for name, dispatcher in dispatchers.items():
        if rule == 'capacity' and not dispatcher.per_token:
            raise ValueError(f"rule must be 'threshold' with the {type(dispatcher).__name__} of {name}, got {rule!r}.")
    if rule == 'capacity' and not trained:  # of random gates there is nothing to find out
        for dispatcher in dispatchers.values():
            dispatcher.set_rule(capacity=rate)
        return network
    fitted = any(dispatcher.fitted for dispatcher in dispatchers.values())
    shared = 'uniform' if not trained else 'global' if fitted else 'rate_matched'
    forwards = [partial(network, part) for part in pool.split(max(1, len(pool) // 4))]
    calibrate(network, forwards, CalibrationRequest(rate, shared, rule == 'capacity'))
    return network


def _dispatched(build: Build, source: nn.Module, request: BenchmarkRequest) -> Iterator[tuple[nn.Module, str | None]]:
    """Models of all dispatches, keys and executors that were asked for, and the executor; no word changes nothing."""
    words = [tuple(given) or (None,) for given in (request.dispatch, request.keys, request.inference)]
    seen = set()
    for dispatch, keep, inference in product(*words):
        changes = dict(dispatch=dispatch, keys=keep, inference=inference)
        if (dispatch or source.backbone.dispatch) == 'mlp' and (keep or source.backbone.keys) == 'all':
            changes['keys'] = 'active'  # the tokens of an MLP attend to nothing
        if (key := tuple(changes.values())) not in seen:
            seen.add(key)
            given = {name: word for name, word in changes.items() if word is not None}
            yield like(source, build(**given)), inference


def _check_fixed(host: nn.Module, request: BenchmarkRequest, inference: str | None) -> None:
    """Refuse ``fixed`` for dispatchers that keep a threshold."""
    if inference == 'fixed' and not request.rate:
        for name, branch in dynamic_branches(host).items():
            dispatcher = branch.dispatcher.decider
            if not (dispatcher.adjustable and dispatcher.per_token):
                raise ValueError(f"inference must not be 'fixed' with the {type(dispatcher).__name__} of {name}.")
            if getattr(dispatcher, 'capacity', None) is None:
                raise ValueError(
                    f"inference must not be 'fixed' without a capacity, got none in {name}. Calibrate the checkpoint "
                    'with tools/calibrate.py --per-image, or set rate.'
                )


def wait(x: Tensor | Sequence[Tensor]) -> None:
    """Until a GPU has done all that it was told."""
    first = x if isinstance(x, Tensor) else x[0]
    if first.is_cuda:
        torch.cuda.synchronize(first.device)
