"""Accuracy against latency: which results of a comparison belong to which variant that was timed."""

import json

import pytest
from mmengine.registry import MODELS

import mmdyt.models  # noqa: F401  registers
from mmdyt.engine.benchmark.accuracy import method_names, points, read_comparison
from mmdyt.engine.comparison_plot import plot_latency

LATENCY = dict(median=2.0, p5=1.0, p95=4.0)
COMPARISON = dict(
    metric='accuracy/top1',
    methods=[
        dict(method='linear', mean=60.0, low=59.0, high=61.0, rate=None),
        dict(method='adapter', mean=None, low=None, high=None, rate=None),
        dict(method='dyt', mean=70.0, low=69.0, high=71.0, rate=0.5),
    ],
)


def row(model: str, rate: float | None = None, **other) -> dict:
    where = dict(device='cpu', dtype='fp32', batch=1, frames=None, compiled=False, latency_ms=LATENCY)
    what = dict(dispatch='mlp', executor='fixed') if model == 'dyt' else dict(dispatch=None, executor=None)
    return dict(model=model, measured_rate=rate, **where | what) | other


def test_a_variant_is_as_good_as_its_method_at_its_rate():
    rows = [row('dense'), row('adapter'), row('dyt', 0.51), row('dyt', 0.51), row('dyt', 0.7), row('dense', batch=8)]
    result = dict(methods=dict(dense='linear', adapter='adapter', dyt='dyt'), rows=rows)
    panels, left_out = points(result, COMPARISON)
    assert {title.split(':')[0]: [one['name'] for one in found] for title, found in panels.items()} == {
        'cpu, fp32, batch 1': ['linear', 'dyt mlp 0.51 fixed'],
        'cpu, fp32, batch 8': ['linear'],
    }
    (dyt,) = [one for found in panels.values() for one in found if one['name'].startswith('dyt')]
    assert {key: dyt[key] for key in ('median', 'mean', 'low', 'high')} == dict(median=2, mean=70, low=69, high=71)
    assert left_out == [
        'adapter: not in the comparison',
        'dyt mlp 0.70 fixed: timed at a rate of 0.700, tested at 0.5',
    ]


@pytest.mark.parametrize(
    ('backbone', 'method', 'expected'),
    [
        (dict(), None, dict(dense='linear', adapter='adapter', dyt='dyt')),
        (dict(dispatcher=dict(type='mmdyt.TokenDispatcher', noise=False, fitted=True)), None,
         dict(dense='linear', adapter='adapter', dyt='evidence')),
        (dict(), 'dyt,adapter.bottleneck=8', dict(dense='linear', adapter='adapter', dyt='dyt,adapter.bottleneck=8')),
        (dict(dispatcher=None, adapter=None), 'lora', dict(dense='linear', adapter='lora', dyt=None)),
        (dict(adapter=dict(type='mmdyt.MoEAdapter')), None, dict(dense='linear', adapter=None, dyt='dyt')),
    ],
)  # fmt: skip
def test_variants_have_the_names_of_methods(backbone, method, expected):
    arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
    built = MODELS.build(dict(type='mmdyt.DyTVisionTransformer', arch=arch, img_size=32, patch_size=8) | backbone)
    assert method_names(built, method) == expected


def test_a_file_of_something_else_is_refused(tmp_path):
    file = tmp_path / 'compare.json'
    for text in ('', '[]', '{"methods": [{"method": "dyt"}]}'):
        file.write_text(text)
        with pytest.raises(ValueError, match='--accuracy must name a compare.json of tools/compare.py, got'):
            read_comparison('--accuracy', file)
    file.write_text(json.dumps(COMPARISON))
    assert read_comparison('--accuracy', file) == COMPARISON


def test_the_plot_is_a_picture(tmp_path):
    found = [dict(name=name, **LATENCY, mean=70.0, low=69.0, high=71.0) for name in ('a', 'b')]
    plot_latency({'cpu': found, 'cuda': found[:1]}, 'mIoU', tmp_path / 'x.png')
    assert (tmp_path / 'x.png').read_bytes().startswith(b'\x89PNG')
