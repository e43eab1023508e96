"""A network that is replayed from a CUDA graph: what it costs without the time that launching takes."""

import torch
import torch.nn as nn
from torch import Tensor

from mmdyt.core.observe import dynamic_branches

WARM_UP = 3  # passes before the capture, in which libraries and kernels set themselves up


class Replayed:
    """The network as one CUDA graph, captured at the first batch; copying a batch into it is part of a pass.

    Args:
        network: In eval, on a GPU.

    Raises:
        ValueError: At the first batch, if the network waits for the GPU: a graph cannot.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def __call__(self, batch: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self._graph is None:
            self._capture(batch)
        self._batch.copy_(batch)
        self._graph.replay()
        return self._result

    def _capture(self, batch: Tensor) -> None:
        check_capturable(self.network)
        self._batch = batch.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.network(self._batch)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._result = self.network(self._batch)
        self._graph = graph


def check_capturable(network: nn.Module) -> None:
    """Refuse a network that waits for the GPU: a threshold, and packing, ask how many tokens are active.

    Raises:
        ValueError: If a branch does, by its name.
    """
    for name, branch in dynamic_branches(network).items():
        if branch.inference == 'masked':  # all tokens run
            continue
        rule = 'a threshold' if getattr(branch.dispatcher.decider, 'capacity', None) is None else 'a capacity'
        if branch.inference == 'packed' or rule == 'a threshold':
            raise ValueError(
                f"inference must be 'fixed', by a capacity, in a CUDA graph, got {branch.inference!r} with {rule} in "
                f'{name}. Take --inference fixed and --rule capacity.'
            )
