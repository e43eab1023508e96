"""How much memory a forward pass needs at most."""

import json
import tempfile
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
    return (held + (_added_on_gpu if batch.is_cuda else _added_on_cpu)(network, batch)) / MEGABYTE


def _added_on_gpu(network: nn.Module, batch: Tensor) -> int:
    """Bytes above what was allocated before."""
    torch.cuda.synchronize(batch.device)
    torch.cuda.reset_peak_memory_stats(batch.device)
    before = torch.cuda.memory_allocated(batch.device)
    network(batch)
    torch.cuda.synchronize(batch.device)
    return torch.cuda.max_memory_allocated(batch.device) - before


def _added_on_cpu(network: nn.Module, batch: Tensor) -> int:
    """Bytes above what was allocated before; the profiler notes each allocation, and frees as negative ones."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        network(batch)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'trace.json')
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())['traceEvents']
    found = [(event['ts'], event['args']['Bytes']) for event in events if event.get('name') == '[memory]']
    return max(accumulate(number for _, number in sorted(found, key=lambda one: one[0])), default=0)
