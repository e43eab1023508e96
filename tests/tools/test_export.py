"""tools/export.py: one file that computes what the model does, for other images and any number of them."""

import json
import re
import sys

import pytest
import torch
from conftest import ROOT, load_tool
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

import mmdyt.models.classifier
import mmdyt.models.segmentor  # noqa: F401  repairs the wheels, registers
from mmdyt.core.fit.calibrate import token_dispatchers
from mmdyt.engine.export import Deployed, read_program
from mmdyt.preflight.methods import use_method

SIZES = dict(cls=(32, 32), seg=(64, 96))
CONTEXT = ('model.backbone.dispatch=layer', 'model.backbone.keys=all')
PAPER = ('model.backbone.dispatch=mlp',)


@pytest.fixture
def saved(tiny_cls_config, tiny_config, tmp_path):
    """``saved(task, capacity)``: a config, a checkpoint of it with random gates, and the model."""

    def save(task, capacity=0.5, options=CONTEXT):
        path = dict(cls=tiny_cls_config, seg=tiny_config)[task]
        cfg = Config.fromfile(path, import_custom_modules=False)
        cfg.merge_from_dict(dict(option.split('=') for option in options))
        cfg.model.backbone.init_cfg = None
        init_default_scope(cfg.default_scope)
        torch.manual_seed(0)
        model = MODELS.build(cfg.model).eval()
        for dispatcher in token_dispatchers(model).values():
            torch.nn.init.normal_(dispatcher.gate.weight)
            dispatcher.set_rule(0.0, capacity)
        torch.save(dict(state_dict=model.state_dict()), tmp_path / f'{task}.pth')
        return path, tmp_path / f'{task}.pth', Deployed(model)

    return save


@pytest.fixture
def exported(run_tool, saved, tmp_path, capfd):
    """``exported(task, name, ...)`` exports a model to a file; returns file, model and report."""

    def export(task, name, *args, options=CONTEXT):
        config, checkpoint, model = saved(task, options=options)
        out, report = tmp_path / name, tmp_path / 'report.json'
        given = ('--json', report, '--images', 4, '--rounds', 0, *args, '--cfg-options', *options)
        run_tool('export', config, checkpoint, out, *given)
        return out, model, json.loads(report.read_text())

    return export


@pytest.fixture
def refused(run_tool, saved, tmp_path, capfd):
    """``refused(...)`` returns the message with which the tool refuses; nothing is written."""

    def refuse(*args, task='cls', capacity=0.5, out='out.onnx', checkpoint=None) -> str:
        config, found, _ = saved(task, capacity)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            run_tool('export', config, checkpoint or found, tmp_path / out, *args, '--cfg-options', *CONTEXT)
        assert exit_info.value.code == 2
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == before
        message = capfd.readouterr().err.splitlines()[-1]
        assert re.match(r'error: .*\S+ must .+, got .+', message)
        return message

    return refuse


@pytest.mark.parametrize(('task', 'options'), [('cls', CONTEXT), ('seg', CONTEXT), ('seg', PAPER)])
def test_a_program_computes_what_the_model_does(exported, task, options):
    out, model, report = exported(task, 'out.pt2', options=options)
    run, facts = read_program(out)
    assert facts == report['facts'] and facts['size'] == list(SIZES[task])
    assert facts['mean'] == pytest.approx([127.5] * 3 if task == 'cls' else facts['mean'])
    assert set(facts['capacities'].values()) == {0.5} and len(facts['capacities']) == 4
    with torch.no_grad():
        for count in (1, 3):
            images = torch.randn(count, 3, *SIZES[task])
            torch.testing.assert_close(run(images), model(images), rtol=0, atol=1e-4)
    assert report['check']['equal'] == report['check']['predictions'] and report['check']['images'] == 4


@pytest.mark.parametrize('task', SIZES)
def test_an_onnx_file_computes_what_the_model_does(exported, task):
    onnx = pytest.importorskip('onnx', reason='the extra export is not installed')
    onnxruntime = pytest.importorskip('onnxruntime', reason='the extra export is not installed')
    out, model, report = exported(task, 'out.onnx', '--opset', 18, '--int8')
    session = onnxruntime.InferenceSession(out)
    assert [(i.name, i.shape) for i in session.get_inputs()] == [('image', ['batch', 3, *SIZES[task]])]
    with torch.no_grad():
        for count in (1, 3):
            images = torch.randn(count, 3, *SIZES[task])
            (scores,) = session.run(['scores'], dict(image=images.numpy()))
            torch.testing.assert_close(torch.from_numpy(scores), model(images), rtol=0, atol=1e-4)
    found = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    assert found == report['facts'] and found['channels'] == 'RGB'
    assert onnx.load(out).opset_import[0].version == 18
    metric = dict(cls='accuracy/top1', seg='mIoU')[task]
    assert report['accuracy']['eager'] == report['accuracy']['onnxruntime']
    assert metric in report['accuracy']['onnxruntime int8']
    assert (out.parent / 'out.int8.onnx').exists()
    assert not list(out.parent.glob('.*'))


@pytest.mark.parametrize(
    ('task', 'method', 'name'),
    [
        ('cls', 'sparse_tuning', 'out.pt2'),
        ('seg', 'sparse_tuning', 'out.onnx'),
        pytest.param('seg', 'tome', 'out.pt2', marks=pytest.mark.slow),
    ],
)
def test_a_model_of_fewer_tokens_is_exported_with_its_features_restored(
    run_tool, tiny_cls_config, tiny_config, tmp_path, capfd, task, method, name
):
    path = dict(cls=tiny_cls_config, seg=tiny_config)[task]
    cfg = Config.fromfile(path, import_custom_modules=False)
    use_method(cfg, method)
    cfg.model.backbone.init_cfg = None
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    report = tmp_path / 'report.json'
    given = ('--json', report, '--images', 3, '--rounds', 0, '--method', method)
    run_tool('export', path, tmp_path / 'model.pth', tmp_path / name, *given)
    check = json.loads(report.read_text())['check']
    assert check['equal'] == check['predictions'] > 0 and check['images'] == 3


def test_the_example_of_the_docs_runs(exported, monkeypatch, capfd):
    pytest.importorskip('onnxruntime', reason='the extra export is not installed')
    out, *_ = exported('cls', 'model.onnx')
    monkeypatch.chdir(out.parent)
    Image.new('RGB', (40, 30), 'red').save('image.jpg')
    capfd.readouterr()
    exec(re.search(r'```python\n(.*?)```', (ROOT / 'docs/export.md').read_text(), re.DOTALL)[1], {})
    assert capfd.readouterr().out.strip() in ('0', '1', '2')


def test_times_stand_beside_those_of_the_network_without_parts(exported):
    *_, report = exported('cls', 'out.pt2', '--rounds', 2, '--batch', 3)
    assert set(report['latency']['milliseconds']) == {'eager', 'pt2', 'eager dense', 'pt2 dense'}
    assert report['latency']['batch'] == 3


def test_what_the_user_typed_is_checked(refused, tmp_path):
    assert "out must end with one of ['.onnx', '.pt2'], got " in refused(out='out.pth')
    assert 'out must name a file in an existing folder, got ' in refused(out='nowhere/out.onnx')
    (tmp_path / 'out.pt2').mkdir()
    assert 'out must name a file in an existing folder, got ' in refused(out='out.pt2')
    assert '--json must name a file in an existing folder' in refused('--json', tmp_path / 'nowhere/report.json')
    assert 'checkpoint must name an existing file, got no.pth' in refused(checkpoint='no.pth')
    assert '--opset must lie between 18 and 23, got 7' in refused('--opset', 7)
    assert '--int8 must come with an .onnx file' in refused('--int8', out='new.pt2')
    assert '--images must be at least 1, got 0' in refused('--images', 0)
    assert '--shape must hold two positive sizes' in refused('--shape', 0, 32)
    assert '--rule must come with --target-rate' in refused('--rule', 'global')


def test_missing_libraries_are_named_with_the_remedy(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    message = refused()
    assert 'onnxscript must be installed' in message and "pip install -e '.[export]'" in message


def test_thresholds_are_refused_with_the_remedy(refused):
    message = refused(capacity=None)
    assert 'dispatchers must have a capacity' in message and '--per-image' in message and '--target-rate' in message


@pytest.mark.slow
def test_thresholds_can_be_calibrated_first(run_tool, saved, tmp_path):
    config, checkpoint, _ = saved('cls', None)
    given = ('--target-rate', 0.5, '--rule', 'uniform', '--images', 2, '--rounds', 0)
    run_tool('export', config, checkpoint, tmp_path / 'out.pt2', *given, '--cfg-options', *CONTEXT)
    assert set(read_program(tmp_path / 'out.pt2')[1]['capacities'].values()) == {0.5}


def test_clips_are_refused(run_tool, tiny_video_config, tmp_path, capfd):
    cfg = Config.fromfile(tiny_video_config, import_custom_modules=False)
    import mmdyt.models.recognizer  # noqa: F401

    init_default_scope('mmaction')
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), tmp_path / 'video.pth')
    with pytest.raises(SystemExit):
        run_tool('export', tiny_video_config, tmp_path / 'video.pth', tmp_path / 'out.pt2')
    assert 'model must be a classifier or a segmentor of images to be exported, got a DyT' in capfd.readouterr().err


def test_a_file_that_computes_something_else_is_not_written(saved, tmp_path, monkeypatch):
    tool = load_tool('export')
    config, checkpoint, _ = saved('cls')
    argv = ['export', config, checkpoint, tmp_path / 'out.pt2', '--images', 3, '--cfg-options', *CONTEXT]
    monkeypatch.setattr('sys.argv', list(map(str, argv)))
    monkeypatch.setattr(tool, 'read_program', lambda path: (lambda images: torch.zeros(len(images), 3), {}))
    with pytest.raises(SystemExit) as exit_info:
        tool.main()
    assert re.match(r'error: 3 of 3 images have scores that differ by more than .*test\d.png', str(exit_info.value))
    assert not (tmp_path / 'out.pt2').exists()
