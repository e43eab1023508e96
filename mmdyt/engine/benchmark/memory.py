"""How much memory a forward pass, or a training step, needs at most."""

import json
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

MEGABYTE = 2**20


def peak_memory(network: nn.Module, batch: Tensor) -> float:
    """Megabytes (2^20 bytes) of parameters, buffers, the batch, and what a forward pass adds at its peak.

    Other networks on the device do not count. On a GPU torch's allocator tells the peak; on a CPU, the sum over all
    that torch's profiler sees allocated and freed, which leaves out what libraries allocate on their own.

    Args:
        network: On the device of the batch.
        batch: Its input.
    """
    tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers(), batch)}
    held = sum(tensor.nbytes for tensor in tensors.values())
    return held / MEGABYTE + added_memory(lambda: network(batch), batch.device)


def added_memory(run: Callable[[], object], device: torch.device) -> float:
    """Megabytes that something adds at its peak to what was allocated before; measured as :func:`peak_memory` says."""
    return (_added_on_gpu(run, device) if device.type == 'cuda' else _added_on_cpu(run)) / MEGABYTE


def _added_on_gpu(run: Callable[[], object], device: torch.device) -> int:
    """Bytes above what was allocated before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _added_on_cpu(run: Callable[[], object]) -> int:
    """Bytes above what was allocated before; the profiler notes each allocation, and frees as negative ones."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'trace.json')
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())['traceEvents']
    found = [(event['ts'], event['args']['Bytes']) for event in events if event.get('name') == '[memory]']
    return max(accumulate(number for _, number in sorted(found, key=lambda one: one[0])), default=0)
