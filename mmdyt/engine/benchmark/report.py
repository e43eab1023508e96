"""What a benchmark was run on, and its results as a table for people."""

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

import torch

NOTE = (
    'Medians. time: to the dense model within a round; MACs: what really ran on these images, to the dense model; '
    'saved: share of the multiply-adds saved that became time saved.'
)
WIDTHS = dict(
    model=20, executor=9, mode=15, rate=7, ms=10, p5=10, p95=10, throughput=11, MACs=8, time=8, saved=7, MB=9
)  # fmt: skip


def machine() -> dict:
    """CPU, cores, GPU and how it multiplies."""
    cuda = torch.cuda.is_available()
    return dict(
        cpu=_cpu_name(),
        cores=os.cpu_count(),
        gpu=torch.cuda.get_device_name() if cuda else None,
        cuda=torch.version.cuda if cuda else None,
        cudnn=torch.backends.cudnn.version() if cuda else None,
        fp32_precision=torch.get_float32_matmul_precision(),
    )


def table(result: Mapping) -> str:
    """One block for each device, dtype and batch."""
    gates = ', random gates' if result['gates'] == 'random' else ''
    rows = result['rows']
    if not rows:
        return 'Nothing could be timed.'
    sample = 'view' if rows[0]['frames'] else 'image'
    lines = [
        f'{result["part"].capitalize()}, {result["images"]} images{gates}, {result["rounds"]} rounds, '
        f'{result["threads"]} threads, {", ".join(filter(None, [result["machine"]["gpu"], result["machine"]["cpu"]]))}.'
    ]
    setting = None
    for row in rows:
        now = row['device'], row['dtype'], row['batch']
        if now != setting:
            setting, size = now, ' x '.join(map(str, [*[row['frames']] * bool(row['frames']), *row['shape']]))
            lines += ['', f'{row["device"]}, {row["dtype"]}, batch {row["batch"]} of {size}', _line(_titles(sample))]
        lines.append(_line(_cells(row)))
    return '\n'.join([*lines, '', NOTE])


def _titles(sample: str) -> dict:
    return {name: name for name in WIDTHS} | dict(throughput=f'{sample}s/s', mode='')


def _cells(row: Mapping) -> dict:
    latency = row['latency_ms']
    words = [row['model'], row['dispatch'], 'keys=all' if row['keys'] == 'all' else None]
    rate = row['measured_rate']
    return dict(
        model=' '.join(word for word in words if word),
        executor=row['executor'] or '-',
        mode=' '.join(filter(None, ['compiled' * row['compiled'], 'graph' * row['cuda_graph']])),
        rate='-' if rate is None else f'{rate:.3f}',
        ms=f'{latency["median"]:.2f}',
        p5=f'{latency["p5"]:.2f}',
        p95=f'{latency["p95"]:.2f}',
        throughput=f'{row["throughput"]:.1f}',
        MACs=f'{row["mac_ratio"]:.3f}',
        time=f'{row["time_ratio"]:.3f}',
        saved='-' if row['saving_share'] is None else f'{row["saving_share"]:.2f}',
        MB='-' if row['peak_memory_mb'] is None else f'{row["peak_memory_mb"]:.0f}',
    )


def _line(cells: Mapping[str, str]) -> str:
    """Words to the left, numbers to the right."""
    left = {'model', 'executor', 'mode'}
    return ''.join(f'{cells[n]:<{w}}' if n in left else f'{cells[n]:>{w}}' for n, w in WIDTHS.items()).rstrip()


def _cpu_name() -> str:
    """As Linux tells it; elsewhere as Python does."""
    info = Path('/proc/cpuinfo')
    found = re.search(r'^model name\s*:\s*(.+)$', info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
