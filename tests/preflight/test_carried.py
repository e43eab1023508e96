"""The config in a checkpoint is read as values; nothing of it is run or imported that is not known."""

import math
import sys

import pytest
import torch
from mmengine.config import Config

from mmdyt.apis import load
from mmdyt.preflight.carried import carried_config, read_values

MODEL = "default_scope = 'mmpretrain'\nmodel = dict(type='ImageClassifier')\ntest_dataloader = dict(dataset=dict("


def test_what_mmengine_writes_is_read_as_it_was(tiny_config):
    cfg = Config.fromfile(tiny_config, import_custom_modules=False)
    odd = {
        'a.b': 1,
        'text': 'it\'s "so"\n',
        'low': -1.5,
        'none': None,
        'pair': (1, -2),
        'nest': [[dict(a=())]],
        3: True,
    }
    cfg.merge_from_dict(dict(odd=dict(inner=odd, wide=math.inf, empty={}, big='x' * 300)))
    cfg.odd.inner['a.b'] = dict(more=[1, {'c-d': 2}])
    assert Config(read_values(cfg.pretty_text, 'it')).to_dict() == cfg.to_dict()
    kept = carried_config(dict(meta=dict(cfg=cfg.pretty_text)), 'it')
    assert kept.model == cfg.model and kept.test_dataloader.dataset.pipeline == cfg.test_dataloader.dataset.pipeline
    assert set(kept) == {'model', 'default_scope', 'custom_imports', 'test_dataloader'}
    hub = dict(message_hub=dict(runtime_info=dict(cfg=cfg.pretty_text)))
    assert carried_config(hub, 'it').to_dict() == kept.to_dict()


@pytest.mark.parametrize(
    'code',
    [
        "x = __import__('os').system('touch {file}')",
        "import os\nos.system('touch {file}')",
        "open('{file}', 'w')",
        "x = [open('{file}', 'w') for _ in (1, 2)]",
        "x = dict(**open('{file}', 'w'))",
        "x = dict(a=open('{file}', 'w'))",
        "x = dict([('a', 1)])",
        "x = (lambda: open('{file}', 'w'))()",
        'x = f\'{{open("{file}", chr(119))}}\'',
        "x = -open('{file}', 'w')",
        'x = model',
        'x.y = 1',
        'x, y = 1, 2',
        'x += 1',
        'def f(): pass',
    ],
)
def test_code_is_refused_and_not_run(code, tmp_path):
    file = tmp_path / 'ran'
    with pytest.raises(ValueError, match='must carry a config of plain values, got .* in line 1'):
        read_values(code.format(file=file), 'it.pth')
    assert not file.exists()


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (None, 'must carry a config where none is named, got none'),
        ('', 'must carry a config where none is named'),
        ('x = <object>', 'that can be read, got SyntaxError'),
        ('x = ' + '[' * 5000 + ']' * 5000, 'that can be read'),
        ("custom_imports = dict(imports=['evil_module'])", "custom_imports must name one of .* got 'evil_module'"),
        ("custom_imports = ['evil_module']", 'custom_imports must list modules'),
        ("default_scope = 'evil_module'", "default_scope must name one of .* got 'evil_module'"),
        ("model = dict(type='evil_module.run')", 'model.type must be a registered type'),
        ("model = dict(type='os.system', command='true')", 'model.type must be a registered type'),
        ("model = dict(type='mmengine.dump', obj=1, file='x')", 'model.type must be a registered type'),
        ("model = dict(type='mmdyt.files.write_text', file='x')", 'model.type must be a registered type'),
        ("model = dict(type='ImageClassifier', head=[dict(type='evil_module')])", r'model.head\[0\].type must be'),
        ("model = dict(type='ImageClassifier', _scope_='evil_module')", 'model._scope_ must name one of'),
        ("model = dict(type=('ImageClassifier',))", 'model.type must be a registered type'),
        ("model = dict(type='mmengine.fileio.dump', obj=1, file='x')", 'model.type must be a registered type'),
        ("model = dict(type='mmseg.none.Here')", 'model.type must be a registered type'),
        ("model = dict(type='mmengine.runner.Runner', work_dir='x')", 'model.type must be a registered type'),
        ("model = dict(type='ImageClassifier', neck=dict(type='mmengine.hooks.EMAHook'))", 'model.neck.type must be'),
        ("model = dict(type='RAM')", 'model.type must be a registered type'),
        ("model = dict(type='TIMMBackbone')", 'model.type must be a registered type'),
        (MODEL + "pipeline=[dict(type='torchvision/ConvertImageDtype', dtype='x')]))", r'pipeline\[0\].type must be'),
        (MODEL + "pipeline=[dict(type='Albumentations', transforms=[])]))", r'pipeline\[0\].type must be'),
        ('x = {[]: 1}', 'that can be read, got TypeError'),
        (MODEL + "pipeline=[dict(type='evil_module.step')]))", r'pipeline\[0\].type must be a registered type'),
    ],
)
def test_what_mmengine_would_run_or_import_is_refused(text, message, tmp_path, monkeypatch):
    (tmp_path / 'evil_module.py').write_text("open('ran', 'w')\ndef run(): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = text if text is None or 'default_scope' in text else f"default_scope = 'mmpretrain'\n{text}" * bool(text)
    path = tmp_path / 'model.pth'
    torch.save(dict(state_dict=dict(a=torch.zeros(1)), meta={} if text is None else dict(cfg=text)), path)
    with pytest.raises(ValueError, match=message):
        load(path)
    assert not (tmp_path / 'ran').exists() and not (tmp_path / 'x').exists() and 'evil_module' not in sys.modules


def test_types_that_are_classes_are_read_by_their_paths():
    """As Python-style configs of mmengine have them, and write them into checkpoints."""
    path = 'mmpretrain.models.classifiers.image.ImageClassifier'
    text = f"default_scope = 'mmpretrain'\nmodel = dict(type='{path}', head=dict(type='mmdyt.MoEAdapterNeck'))"
    assert carried_config(dict(meta=dict(cfg=text)), 'it').model.type == path


@pytest.mark.parametrize(
    'outer', ["dict(type='RepeatDataset', times=2, dataset={})", "dict(type='ConcatDataset', datasets=[{}])"]
)
def test_wrapped_data_sets_are_unwrapped(outer):
    inner = "dict(type='CustomDataset', pipeline=[dict(type='LoadImageFromFile')])"
    model = "model = dict(type='ImageClassifier')\ndefault_scope = 'mmpretrain'\n"
    text = f'{model}test_dataloader = dict(dataset={outer.format(inner)})'
    dataset = carried_config(dict(meta=dict(cfg=text)), 'it').test_dataloader.dataset
    assert dataset.pipeline == [dict(type='LoadImageFromFile')]
