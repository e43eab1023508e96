"""tools/benchmark.py: the file it writes, on the data and the weights that are there; what it refuses."""

import json
import math
from pathlib import Path

import pytest

CONFIG = 'configs/dyt/vitti_cifar100_1k.py'
NO_DATA = '--cfg-options', 'test_dataloader.dataset.data_root=no_such_folder'


@pytest.fixture
def benchmark(run_tool, tmp_path):
    """``benchmark(config, ...)`` returns what the tool writes, read as strict JSON."""

    def run(*args) -> dict:
        file = tmp_path / 'benchmark.json'
        run_tool('benchmark', *args, '--rounds', 2, '--json', file)

        def refuse(word):
            raise AssertionError(word)

        return json.loads(file.read_text(), parse_constant=refuse)

    return run


def test_test_images_and_a_checkpoint(benchmark, tiny_config, trained, capsys):
    checkpoint = trained / 'iter_6.pth'
    found = benchmark(tiny_config, checkpoint, '--batch', 1, 2)
    assert (found['images'], found['image_count']) == ('real', 4)
    assert (found['checkpoint'], found['weights'], found['gates']) == (str(checkpoint), 'checkpoint', 'checkpoint')
    assert (found['threads'], found['seed'], found['rounds'], found['part']) == (1, 0, 2, 'model')
    assert found['machine']['cores'] >= 1 and found['machine']['cpu'] and found['versions']['torch']
    assert found['failed'] == [] and found['rule'] is None
    assert [(row['model'], row['batch']) for row in found['rows']] == [
        (model, batch) for batch in (1, 2) for model in ('dense', 'adapter', 'dyt')
    ]
    for row in found['rows']:
        assert (row['task'], row['shape'], row['frames'], row['device']) == ('segmentation', [64, 96], None, 'cpu')
        assert math.isfinite(row['latency_ms']['median']) and row['split_ms']['head'] > 0
    dyt = found['rows'][2]
    assert (dyt['executor'], dyt['rate']) == ('packed', None) and 0 < dyt['measured_rate'] < 1
    out = capsys.readouterr().out
    assert 'Model, real images, 2 rounds, 1 threads' in out and 'random gates' not in out


def test_a_rate_is_calibrated_on_the_images(benchmark, tiny_config, trained):
    rule = '--rule', 'threshold'
    found = benchmark(tiny_config, trained / 'iter_6.pth', '--batch', 4, '--rate', 0.25, 0.75, *rule)
    rates = [row['measured_rate'] for row in found['rows'] if row['model'] == 'dyt']
    assert rates == pytest.approx([0.25, 0.75], abs=0.03) and found['rule'] == 'threshold'


def test_generated_images_and_no_weights(benchmark, tiny_cls_config, capsys):
    found = benchmark(tiny_cls_config, '--batch', 2, '--dispatch', 'mlp', 'attn', '--shape', 48, 32, *NO_DATA)
    assert (found['images'], found['checkpoint'], found['weights']) == ('generated', None, 'base')
    assert found['gates'] == 'random'
    rows = [(row['model'], row['dispatch'], row['executor'], row['rate']) for row in found['rows'][2:]]
    assert rows == [('dyt', 'mlp', 'fixed', 0.5), ('dyt', 'attn', 'fixed', 0.5)]  # the rate of the config
    assert {tuple(row['shape']) for row in found['rows']} == {(48, 32)}
    out = capsys.readouterr().out
    assert 'Generated images: test_dataloader.dataset.data_root must name an existing folder' in out
    assert 'random gates' in out


def test_nothing_is_downloaded(run_tool, tmp_path, monkeypatch, capsys):
    def download(*args, **kwargs):
        raise AssertionError('a benchmark must not download')

    monkeypatch.setattr('mmpretrain.datasets.cifar.download_and_extract_archive', download)
    options = 'model.backbone.arch=deit-tiny', 'model.head.in_channels=192'
    root = f'test_dataloader.dataset.data_root={tmp_path / "none"}'
    config = 'configs/dyt/vitb_cifar100.py', '--batch', 1, '--rounds', 1
    run_tool('benchmark', *config, '--cfg-options', *options, root)
    assert 'Generated images: Cannot find' in capsys.readouterr().out


@pytest.mark.parametrize('options', [(), NO_DATA], ids=['real', 'generated'])
def test_views_of_clips(benchmark, tiny_video_config, options):
    found = benchmark(tiny_video_config, '--batch', 2, *options)
    assert found['images'] == ('generated' if options else 'real')
    assert {(row['task'], row['frames'], *row['shape']) for row in found['rows']} == {('video', 8, 32, 32)}
    assert found['image_count'] == 4


@pytest.mark.parametrize(
    ('dispatcher', 'rule', 'rate'),
    [("type='mmdyt.SampleDispatcher'", 'threshold', 0.5), ("_delete_=True,type='mmdyt.RandomDispatcher'", None, None)],
)
def test_the_defaults_are_what_the_dispatchers_allow(benchmark, tiny_cls_config, tmp_path, dispatcher, rule, rate):
    config = tmp_path / 'config.py'
    change = f'model = dict(backbone=dict(dispatcher=dict({dispatcher})))'
    config.write_text(f'_base_ = {str(tiny_cls_config)!r}\n{change}\n')
    found = benchmark(config, '--batch', 2)
    assert (found['rule'], found['rows'][2]['rate']) == (rule, rate) and found['failed'] == []


def test_another_method(benchmark, tiny_cls_config):
    found = benchmark(tiny_cls_config, '--batch', 1, '--method', 'lora', '--part', 'backbone')
    assert [row['model'] for row in found['rows']] == ['dense', 'adapter'] and found['method'] == 'lora'
    assert found['rows'][1]['mac_ratio'] > 1 and found['rows'][1]['split_ms']['head'] is None


def test_the_break_even_is_one_that_the_backbone_takes(run_tool, tiny_cls_config, tmp_path):
    file = tmp_path / 'break_even.json'
    run_tool('benchmark', tiny_cls_config, '--batch', 1, '--rounds', 1, '--write-break-even', file)
    found = json.loads(file.read_text())
    assert 0 < found['break_even'] <= 1 and len(found['settings']) == 1
    option = f'model.backbone.break_even={found["break_even"]}'
    run_tool('benchmark', tiny_cls_config, '--batch', 1, '--rounds', 1, '--cfg-options', option)


def test_the_plot_has_what_the_comparison_knows(run_tool, tiny_cls_config, tmp_path, capsys):
    rows = [dict(method=name, mean=50.0, low=49.0, high=51.0, rate=None) for name in ('linear', 'dyt')]
    (tmp_path / 'compare.json').write_text(json.dumps(dict(metric='accuracy/top1', methods=rows)))
    files = '--accuracy', tmp_path / 'compare.json', '--plot', tmp_path / 'latency.png'
    run_tool('benchmark', tiny_cls_config, '--batch', 1, '--rounds', 1, *files)
    out = capsys.readouterr().out
    assert 'Not in the plot: adapter: not in the comparison.' in out and 'tested at None.' in out
    assert (tmp_path / 'latency.png').stat().st_size > 0


@pytest.mark.parametrize(
    ('args', 'expected'),
    [
        ((CONFIG, '--dtype', 'fp8'), "dtype must be one of ['fp32', 'bf16', 'fp16'], got 'fp8'."),
        ((CONFIG, '--batch', '0'), 'batch must be at least 1, got 0.'),
        ((CONFIG, '--rate', '50'), 'rate must lie in (0, 1], got 50.0.'),
        ((CONFIG, 'no.pth'), 'checkpoint must name an existing file, got no.pth.'),
        ((CONFIG, 'no.pth', '--dispatch', 'attn'), '--dispatch must be left out with a checkpoint, which was trained'),
        ((CONFIG, '--json', 'no_such_folder/x.json'), '--json must name a file in an existing folder'),
        ((CONFIG, '--plot', 'x.png'), '--plot must come with --accuracy, got x.png and None.'),
        (
            (CONFIG, '--accuracy', 'no.json', '--plot', 'x.png'),
            '--accuracy must name a compare.json of tools/compare.py, got no.json.',
        ),
        ((CONFIG, '--method', 'linear', '--rate', '0.5'), '--rate must be left out for a model without dispatchers'),
        (('configs/demo/pretrain_shapes.py',), 'model must have a mmdyt.DyTVisionTransformer as its backbone'),
    ],
)
def test_refusals(run_tool, capfd, args, expected):
    with pytest.raises(SystemExit) as exit_info:
        run_tool('benchmark', *args)
    assert exit_info.value.code == 2
    (message,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith('error: ')]
    assert expected in message
    assert not Path('no_such_folder').exists()


def test_a_checkpoint_of_another_model_is_refused(run_tool, capfd, tiny_cls_config, trained):
    with pytest.raises(SystemExit):
        run_tool('benchmark', tiny_cls_config, trained / 'iter_6.pth')
    assert 'checkpoint must fit the model' in capfd.readouterr().err
