"""What the benchmark of inference may be asked for, and what it refuses."""

import pytest
import torch

from mmdyt.engine.benchmark.request import BenchmarkRequest


@pytest.mark.parametrize(
    ('asked', 'expected'),
    [
        (dict(batch=(0,)), 'batch must be at least 1, got 0.'),
        (dict(batch=(1, 1)), 'batch must hold different values, got [1, 1].'),
        (dict(rounds=0), 'rounds must be at least 1, got 0.'),
        (dict(threads=0), 'threads must be at least 1, got 0.'),
        (dict(seed=-1), 'seed must be at least 0, got -1.'),
        (dict(shape=(0, 32)), 'shape must hold two positive sizes in pixels, got [0, 32].'),
        (dict(rate=(50,)), 'rate must lie in (0, 1], got 50. Rates are fractions, not percent.'),
        (dict(rule='both'), "rule must be one of ['capacity', 'threshold'], got 'both'."),
        (dict(dtype=('int8',)), "dtype must be one of ['fp32', 'bf16', 'fp16'], got 'int8'."),
        (dict(device=('tpu',)), "device must be one of ['cpu', 'cuda'], got 'tpu'."),
        (dict(inference=('dense',)), "inference must be one of ['auto', 'packed', 'fixed', 'masked'], got 'dense'."),
        (dict(dispatch=('all',)), "dispatch must be one of ['mlp', 'attn', 'attn_mlp', 'layer'], got 'all'."),
        (dict(dispatch=('mlp',), keys=('all',)), "keys must be 'active' with dispatch='mlp'"),
        (dict(inference=('fixed',), rate=(0.5,), rule='threshold'), "inference must not be 'fixed' with rule="),
        (dict(cuda_graphs=True, device=('cpu',)), 'cuda_graphs must be left out on a CPU, got it for cpu.'),
        (dict(part='head'), "part must be one of ['model', 'backbone'], got 'head'."),
    ],
)
def test_requests_are_refused(asked, expected):
    with pytest.raises(ValueError) as info:
        BenchmarkRequest(**asked)
    assert str(info.value).startswith(expected)


def test_missing_devices_and_operators_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ValueError, match="device must be 'cpu' where torch finds no CUDA device, got 'cuda'"):
        BenchmarkRequest(device=('cuda',))

    def conv2d(*args, **kwargs):
        raise RuntimeError('"slow_conv2d_cpu" not implemented for \'Half\'')

    monkeypatch.setattr('mmdyt.engine.benchmark.request.F.conv2d', conv2d)
    with pytest.raises(ValueError, match='dtype must be one that cpu computes in, got .fp16.: "slow_conv2d_cpu" not'):
        BenchmarkRequest(dtype=('fp16',))
