"""Benchmark of inference: what the variants are, whose turn it is, what is counted, what the rows hold."""

import math
from typing import ClassVar

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

import mmdyt.models.classifier
import mmdyt.models.recognizer
import mmdyt.models.segmentor  # noqa: F401  registers
from mmdyt.core.macs import count_macs
from mmdyt.core.observe import dynamic_branches
from mmdyt.core.part import parts
from mmdyt.engine.benchmark.graphs import Replayed, check_capturable
from mmdyt.engine.benchmark.images import Images, generated_images, pool_size
from mmdyt.engine.benchmark.measure import COLUMNS, count, count_rounds, measure, placed, ratio, take_rounds, turns
from mmdyt.engine.benchmark.memory import peak_memory
from mmdyt.engine.benchmark.report import machine, table
from mmdyt.engine.benchmark.request import BenchmarkRequest
from mmdyt.engine.benchmark.variants import Network, build_variants

ARCH = dict(embed_dims=32, num_layers=4, num_heads=2, feedforward_channels=64)
ADAPTER = dict(type='mmdyt.Adapter', bottleneck=2)
VIT = dict(type='mmdyt.DyTVisionTransformer', arch=ARCH, img_size=32, patch_size=8, adapter=ADAPTER)
HOSTS = dict(
    classification=(
        'mmpretrain',
        dict(
            type='mmdyt.DyTImageClassifier',
            head=dict(type='VisionTransformerClsHead', num_classes=5, in_channels=32),
        ),
        dict(),
    ),
    segmentation=(
        'mmseg',
        dict(
            type='mmdyt.DyTEncoderDecoder',
            neck=dict(type='Feature2Pyramid', embed_dim=32, rescales=[4, 2, 1, 0.5], norm_cfg=dict(type='BN')),
            decode_head=dict(
                type='FCNHead', in_channels=32, channels=8, num_classes=3, in_index=0, norm_cfg=dict(type='BN')
            ),
            train_cfg=dict(),
            test_cfg=dict(mode='slide', crop_size=(32, 48), stride=(16, 16)),
        ),
        dict(out_type='featmap', out_indices=(0, 1, 2, 3), final_norm=False),
    ),
    video=(
        'mmaction',
        dict(
            type='mmdyt.DyTRecognizer',
            data_preprocessor=dict(type='ActionDataPreprocessor', format_shape='NCTHW'),
            neck=dict(type='mmdyt.ClipNeck', in_channels=32, aggregator=dict(num_heads=2)),
            cls_head=dict(type='TimeSformerHead', num_classes=5, in_channels=32, average_clips='score'),
        ),
        dict(out_type='raw'),
    ),
)


def builder(task: str = 'classification', **own):
    """Builds the tiny model of a task, with other arguments of its backbone."""
    scope, host, vit = HOSTS[task]

    def build(**changes):
        torch.manual_seed(0)
        backbone = (
            dict(type='mmdyt.DyTVisionTransformer', arch=ARCH, img_size=32, patch_size=8, adapter=ADAPTER)
            | vit
            | own
            | changes
        )
        with DefaultScope.overwrite_default_scope(scope):
            model = MODELS.build(host | dict(backbone=backbone))
        for branch in dynamic_branches(model).values():
            if branch.dispatcher.adjustable:
                torch.nn.init.normal_(branch.dispatcher.gate.weight)
        return model

    return build


def images_of(task: str, number: int = 6) -> Images:
    return generated_images(builder(task)(), number, None, 3 if task == 'video' else None, 0)


def run(task: str = 'classification', own=None, trained: bool = False, **asked):
    request = BenchmarkRequest(**dict(batch=(1, 2), rate=(0.5,), rounds=3) | asked)
    images = images_of(task)
    variants = build_variants(builder(task, **(own or {})), request, images.pool, trained)
    found = list(measure(variants, images, request))
    return [row for rows, _ in found for row in rows], [one for _, failed in found for one in failed], variants


def numbers(value):
    """All numbers in a row."""
    if isinstance(value, dict):
        return [number for one in value.values() for number in numbers(one)]
    return [value] if isinstance(value, float) else []


@pytest.mark.parametrize('part', ['model', 'backbone'])
@pytest.mark.parametrize('task', HOSTS)
def test_rows_are_complete_and_finite(task, part):
    rows, failed, _ = run(task, part=part, rate=(0.25, 0.5), inference=('packed', 'fixed', 'masked'))
    assert failed == [] and [row['model'] for row in rows] == (['dense', 'adapter'] + 6 * ['dyt']) * 2
    for row in rows:
        assert tuple(row) == COLUMNS and row['task'] == task
        assert all(math.isfinite(number) for number in numbers(row))
        latency = row['latency_ms']
        assert 0 < latency['p5'] <= latency['median'] <= latency['p95']
        assert row['throughput'] == pytest.approx(row['batch'] / latency['median'] * 1e3)
        wanted = {'backbone', *(['head'] if part == 'model' else [])}
        wanted |= {'neck'} if part == 'model' and task != 'classification' else set()
        assert {name for name, value in row['split_ms'].items() if value is not None} == wanted
        assert row['peak_memory_mb'] > 0
        assert (row['shape'], row['frames']) == (
            [32, 48] if task == 'segmentation' else [32, 32],
            3 if task == 'video' else None,
        )
        if row['model'] == 'dyt':
            assert row['measured_rate'] == pytest.approx(row['rate'], abs=0.05)
            assert (row['executor'], row['dispatch'], row['keys']) == (row['inference'], 'mlp', 'active')
        else:
            assert {row[name] for name in ('executor', 'dispatch', 'keys', 'rate', 'measured_rate')} == {None}


def test_savings_are_of_what_was_saved():
    rows, _, _ = run(inference=('fixed', 'masked'))
    dense, adapter, fixed, masked = rows[:4]
    assert dense['mac_ratio'] == dense['time_ratio'] == 1
    assert fixed['mac_ratio'] < 1 < adapter['mac_ratio'] < masked['mac_ratio']
    assert fixed['saving_share'] == pytest.approx((1 - fixed['time_ratio']) / (1 - fixed['mac_ratio']))
    assert [row['saving_share'] for row in (dense, adapter, masked)] == [None] * 3


@pytest.mark.parametrize('part', ['model', 'backbone'])
@pytest.mark.parametrize('dispatch', ['mlp', 'attn', 'attn_mlp', 'layer'])
@pytest.mark.parametrize('task', HOSTS)
def test_the_mac_ratio_is_that_of_an_operator_counter_at_the_same_masks(task, dispatch, part):
    request = BenchmarkRequest(rate=(0.5,), rule='threshold', inference=('packed',), dispatch=(dispatch,), part=part)
    pool = images_of(task).pool
    dense, adapter, dyt = build_variants(builder(task), request, pool, trained=False)
    x = pool[:1]  # of several views the aggregator's query is projected once, but charged to each
    counted = {one.model: count_macs(lambda one=one: one.network(x)) for one in (dense, adapter, dyt)}
    for one in (adapter, dyt):
        billed = count(one.network, [x])['mac_ratio'] * counted['dense']
        assert counted[one.model] == pytest.approx(billed, rel=1e-12)


def test_all_images_count_where_a_threshold_decides():
    request = BenchmarkRequest(rate=(0.5,), rule='threshold')
    pool = images_of('classification').pool
    network = build_variants(builder(), request, pool, trained=False)[-1].network
    each = [count(network, [x])['mac_ratio'] for x in pool.split(2)]
    assert len(set(each)) > 1
    assert count(network, pool.split(2))['mac_ratio'] == pytest.approx(sum(each) / 3)


def test_the_dense_baseline_has_no_parts_and_the_weights_of_the_others():
    request = BenchmarkRequest(rate=(0.25, 0.5), inference=('packed', 'fixed'))
    own = dict(substitute=dict(type='mmdyt.MeanUpdate'), parts=[dict(type='mmdyt.LoRA', on='attn.qkv')])
    dense, adapter, *dispatched = build_variants(builder(**own), request, images_of('classification').pool, False)
    assert list(parts(dense.network)) == [] and not dynamic_branches(adapter.network)
    assert any(type(part).__name__ == 'LoRA' for part in parts(adapter.network))
    assert len(dispatched) == 4
    for one in (adapter, *dispatched):
        theirs = dict(one.network.named_parameters())
        assert all(theirs[name] is parameter for name, parameter in dense.network.named_parameters())


def test_thresholds_and_capacities_are_each_variants_own():
    request = BenchmarkRequest(rate=(0.25, 0.75))
    pool = images_of('classification').pool
    low, high = build_variants(builder(), request, pool, False)[2:]
    assert [one.network.host.backbone.layers[0].dynamic.mlp.dispatcher.capacity for one in (low, high)] == [0.25, 0.75]
    low, high = build_variants(builder(), BenchmarkRequest(rate=(0.25, 0.75), rule='threshold'), pool, True)[2:]
    thresholds = [one.network.host.backbone.layers[0].dynamic.mlp.dispatcher.threshold.item() for one in (low, high)]
    assert thresholds[0] > thresholds[1]


def test_without_a_rate_the_rule_of_the_model_holds():
    rows, _, variants = run(rate=(), trained=True)
    assert len(variants) == 3 and rows[2]['rate'] is None and 0 < rows[2]['measured_rate'] < 1
    with pytest.raises(ValueError, match="inference must not be 'fixed' without a capacity"):
        run(rate=(), inference=('fixed',))


@pytest.mark.parametrize(
    ('dispatcher', 'asked', 'expected'),
    [
        ('Sample', dict(), "rule must be 'threshold' with the SampleDispatcher of"),
        ('Sample', dict(rate=(), inference=('fixed',)), "inference must not be 'fixed' with the SampleDispatcher of"),
        ('Random', dict(rate=(), inference=('fixed',)), "inference must not be 'fixed' with the RandomDispatcher of"),
        ('Random', dict(), 'model must have a dispatcher with a threshold'),
    ],
)
def test_what_dispatchers_cannot_do_is_refused(dispatcher, asked, expected):
    with pytest.raises(ValueError, match=expected):
        run(own=dict(dispatcher=dict(type=f'mmdyt.{dispatcher}Dispatcher')), **asked)


def test_dispatches_and_keys_are_crossed_where_they_mean_something():
    rows, failed, _ = run(batch=(1,), dispatch=('mlp', 'attn', 'layer'), keys=('active', 'all'), rounds=1)
    pairs = [(row['dispatch'], row['keys']) for row in rows[2:]]
    assert failed == []
    assert pairs == [('mlp', 'active'), ('attn', 'active'), ('attn', 'all'), ('layer', 'active'), ('layer', 'all')]


def test_a_model_without_dispatchers_has_two_rows():
    rows, _, _ = run(own=dict(dispatcher=None), batch=(1,), rate=())
    assert [row['model'] for row in rows] == ['dense', 'adapter']


def test_every_round_begins_with_another_variant():
    assert [turns(3, round_) for round_ in range(4)] == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]
    ran = []
    networks = [lambda x, i=i: ran.append((int(x), i)) for i in range(3)]
    seconds = take_rounds(networks, list(torch.arange(4.0)), 1, lambda: ran.append('|'))
    assert ran == [(0, 0), (0, 1), (0, 2), '|', (1, 1), (1, 2), (1, 0), '|', (2, 2), (2, 0), (2, 1), '|', (3, 0),
                   (3, 1), (3, 2), '|']  # fmt: skip
    assert [len(took) for took in seconds] == [3, 3, 3]


def test_ratios_are_within_rounds():
    assert ratio([2.0, 20.0, 2.0], [1.0, 10.0, 2.0]) == 2  # of medians it would be 1


def test_progress_is_told_as_often_as_was_said():
    told = []
    request = BenchmarkRequest(batch=(1, 2), dtype=('fp32', 'bf16'), rate=(0.5,), rounds=2)
    images = images_of('classification')
    variants = build_variants(builder(), request, images.pool, False)
    assert len(list(measure(variants, images, request, lambda: told.append(1)))) == 4
    assert len(told) == count_rounds(request) == 2 * 2 * (2 + 2 + 2)


def test_images_repeat_only_when_all_were_dealt():
    images = Images(torch.arange(5.0).view(5, 1, 1, 1), 'generated')
    dealt = torch.cat(list(images.deal(2, 5, 0, torch.empty(0)))).flatten().tolist()
    assert sorted(dealt[:5]) == sorted(dealt[5:]) == list(range(5))
    again = images.deal(2, 5, 0, torch.empty(0, dtype=torch.float64))
    assert torch.cat(list(again)).flatten().tolist() == dealt and again[0].dtype == torch.float64
    assert torch.cat(list(again[2:])).flatten().tolist() == dealt[4:]
    assert [len(x) for x in images.deal(7, 2, 0, torch.empty(0))] == [7, 7]
    assert (pool_size((1, 8), 20), pool_size((1, 256), 20), pool_size((1,), 3)) == (160, 512, 3)


def test_half_precision_keeps_the_gates():
    request = BenchmarkRequest(dtype=('bf16',), rate=(0.5,), rule='threshold')
    variants = build_variants(builder(), request, images_of('classification').pool, False)
    ((_, _, found),) = placed(variants, request)
    before, after = variants[-1].network, found[-1].network
    assert after.host.backbone.patch_embed.projection.weight.dtype == torch.bfloat16
    assert before.host.backbone.patch_embed.projection.weight.dtype == torch.float32
    states = [
        {name: tensor for name, tensor in one.state_dict().items() if '.dispatcher.' in name} for one in (before, after)
    ]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    dense = dict(found[0].network.named_parameters())
    assert all(dense[name] is p for name, p in after.named_parameters() if name in dense)  # they share as before


@pytest.mark.parametrize('last', [False, True])  # thresholds: a later batch may have more active tokens
@pytest.mark.parametrize('which', ['adapter', 'dense'])
def test_what_cannot_run_is_named_and_the_rest_is_timed(monkeypatch, which, last):
    real, calls = Network.forward, []

    def forward(self, x):
        kinds = bool(dynamic_branches(self)), bool(list(parts(self)))
        if kinds == (False, which == 'adapter'):
            calls.append(x)
        if kinds == (False, which == 'adapter') and (not last or len(calls) == 5):
            raise torch.OutOfMemoryError('CUDA out of memory.\nMore.')
        return real(self, x)

    monkeypatch.setattr(Network, 'forward', forward)
    rows, failed, _ = run(batch=(1,))
    memory, base = 'OutOfMemoryError: CUDA out of memory.', 'there is no dense model to measure it by'
    expected = (
        {'adapter': memory} if which == 'adapter' else {'dense': memory, 'adapter': base, 'dyt mlp rate=0.5': base}
    )
    assert [row['model'] for row in rows] == (['dense', 'dyt'] if which == 'adapter' else [])
    assert failed == [
        dict(device='cpu', dtype='fp32', batch=1, variant=name, reason=reason) for name, reason in expected.items()
    ]


def test_peak_memory_is_that_of_the_tensors():
    network = torch.nn.Sequential(torch.nn.Linear(1024, 1024, bias=False), torch.nn.ReLU())
    x = torch.zeros(2048, 1024)
    with torch.no_grad():  # weights 4 MB, and three tensors of 8 MB: the input, the product, its positive part
        assert peak_memory(network, x) == pytest.approx(4 + 3 * 8, abs=0.1)


def test_the_table_has_a_line_for_each_row():
    rows, _, _ = run()
    result = dict(rows=rows, gates='random', images='generated', part='model', rounds=3, threads=1, machine=machine())
    lines = table(result).splitlines()
    assert lines[0].startswith('Model, generated images, random gates, 3 rounds, 1 threads, ')
    assert sum(line.startswith(('dense', 'adapter', 'dyt mlp')) for line in lines) == len(rows)
    assert sum(line.startswith('cpu, fp32, batch') for line in lines) == 2


@pytest.mark.slow
def test_compiled_variants_stand_beside_eager_ones():
    rows, failed, _ = run(batch=(1,), compiled=True, inference=('packed', 'fixed'), rounds=1)
    assert failed == [] and [row['compiled'] for row in rows] == [False] * 4 + [True] * 4
    assert [row['mac_ratio'] for row in rows[:4]] == [row['mac_ratio'] for row in rows[4:]]


class Counted(Replayed):
    """Runs the network in place of a graph; the dense one fails where it is told to."""

    passes: ClassVar[int] = 0
    fail_dense: ClassVar[bool] = False

    def __call__(self, batch):
        Counted.passes += 1
        if self.fail_dense and not list(parts(self.network)):
            raise RuntimeError('operation not permitted when stream is capturing')
        return self.network(batch)


@pytest.fixture
def rows_with_graphs(monkeypatch):
    """Rows and failures at batch 1 with CUDA graphs, as a GPU gives them."""
    monkeypatch.setattr('mmdyt.engine.benchmark.measure.Replayed', Counted)
    monkeypatch.setattr(Counted, 'passes', 0)

    def make(fail_dense=False):
        monkeypatch.setattr(Counted, 'fail_dense', fail_dense)
        request = BenchmarkRequest(batch=(1,), rate=(0.5,), rounds=3)
        object.__setattr__(request, 'cuda_graphs', True)  # past the refusal of a CPU
        images = images_of('classification')
        ((rows, failed),) = measure(build_variants(builder(), request, images.pool, False), images, request)
        return rows, failed

    return make


def test_replayed_variants_stand_beside_launched_ones(rows_with_graphs):
    rows, failed = rows_with_graphs()
    assert failed == [] and Counted.passes == 3 * (2 + 3)  # rounds that warm up, and those that are timed
    assert [(row['model'], row['cuda_graph']) for row in rows] == [
        (model, graph) for graph in (False, True) for model in ('dense', 'adapter', 'dyt')
    ]
    for row, launched in zip(rows[3:], rows[:3], strict=True):
        assert tuple(row) == COLUMNS and row['split_ms'] is None and row['peak_memory_mb'] is None
        assert {row[name] == launched[name] for name in ('executor', 'measured_rate', 'gmacs', 'mac_ratio')} == {True}
    assert rows[3]['time_ratio'] == 1  # replayed ones are measured by the replayed dense model
    about = dict(gates='random', images='generated', part='model', rounds=3, threads=1, machine=machine())
    lines = [line.split() for line in table(dict(rows=rows) | about).splitlines()]
    modes = [('graph' in line, line[-1] == '-') for line in lines if line and line[0] in ('dense', 'adapter', 'dyt')]
    assert modes == [(False, False)] * 3 + [(True, True)] * 3


def test_without_a_dense_graph_no_graph_has_a_row(rows_with_graphs):
    rows, failed = rows_with_graphs(fail_dense=True)
    assert [row['cuda_graph'] for row in rows] == [False] * 3
    base = 'there is no dense model to measure it by'
    assert [(one['variant'], one['reason'] == base) for one in failed] == [
        ('dense graph', False), ('adapter graph', True), ('dyt mlp rate=0.5 graph', True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ('inference', 'rule', 'message'),
    [
        ('auto', dict(capacity=0.5), None),
        ('fixed', dict(capacity=0.5), None),
        ('masked', dict(threshold=0.0), None),
        ('packed', dict(capacity=0.5), "got 'packed' with a capacity in"),
        ('auto', dict(threshold=0.0), "got 'auto' with a threshold in"),
        ('packed', dict(threshold=0.0), "got 'packed' with a threshold in"),
    ],
)
def test_a_graph_is_refused_of_what_waits_for_the_gpu(inference, rule, message):
    network = Network(builder(inference=inference)())
    for branch in dynamic_branches(network).values():
        branch.dispatcher.set_rule(**rule)
    if message is None:
        check_capturable(network)
        return
    with pytest.raises(ValueError) as info:
        Replayed(network)(torch.zeros(1, 3, 32, 32))  # before it asks for a GPU
    first = next(iter(dynamic_branches(network)))
    assert f'{message} {first}. Take --inference fixed' in str(info.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_a_graph_gives_what_the_network_gives_of_each_batch():
    network = Network(builder(inference='fixed')()).cuda()
    for branch in dynamic_branches(network).values():
        branch.dispatcher.set_rule(capacity=0.5)
    replayed = Replayed(network)
    with torch.no_grad():
        for _ in range(2):
            batch = torch.randn(2, 3, 32, 32, device='cuda')
            torch.testing.assert_close(replayed(batch).clone(), network(batch))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_rows_of_a_gpu():
    rows, failed, _ = run(device=('cpu', 'cuda'), dtype=('fp32', 'bf16', 'fp16'), inference=('packed', 'fixed'))
    assert failed == [] and len(rows) == 2 * 3 * 2 * 4
    assert all(math.isfinite(number) for row in rows for number in numbers(row))
