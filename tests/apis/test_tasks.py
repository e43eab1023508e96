"""Several tuned-only files on one base: each predicts as alone, and the base is in memory once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from predicting import make_checkpoint

from mmdyt.apis import load, load_tasks
from mmdyt.tuned.file import read, write
from mmdyt.tuned.model import tuned_only

NONE = {'model.backbone.adapter': None, 'model.backbone.dispatcher': None}
OPTIONS = {
    'dyt': {},
    'lora': NONE | {'model.backbone.parts': [dict(type='mmdyt.LoRA', rank=4)]},
    'seven': {'model.head.num_classes': 7, 'model.backbone.adapter.bottleneck': 8},
}


def tuned_file(config: Path, folder: Path, options: dict, shift: float) -> Path:
    """Of a random model, whose tuned weights are moved."""
    folder.mkdir(exist_ok=True)
    content = torch.load(make_checkpoint(config, folder, options=options))
    for name, tensor in content['state_dict'].items():
        if 'dynamic' in name or 'head' in name:
            tensor.add_(shift * torch.randn_like(tensor) if tensor.is_floating_point() else 0)
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(options)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    write(tuned_only(model, content), folder / 'x.safetensors')
    return folder / 'x.safetensors'


@pytest.fixture(scope='module')
def files(tiny_cls_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp('tasks')
    pairs = enumerate(OPTIONS.items())
    return {name: tuned_file(tiny_cls_config, folder / name, options, 0.1 * i) for i, (name, options) in pairs}


@pytest.fixture(scope='module')
def images(tiny_cls_config):
    return [str(path) for path in sorted(tiny_cls_config.parent.glob('test*.png'))[:6]]


def same(one, other) -> None:
    assert [scored[:2] for scored in one.top] == [scored[:2] for scored in other.top]
    np.testing.assert_allclose([s.score for s in one.top], [s.score for s in other.top], atol=1e-5)
    assert one.rates == other.rates and one.file == other.file


@pytest.mark.parametrize('batch_size', [1, 4])
def test_a_mixed_batch_is_each_task_alone(files, images, batch_size):
    tasks = load_tasks(files)
    order = ['dyt', 'lora', 'seven', 'lora', 'dyt', 'seven']
    found = tasks(images, order, batch_size=batch_size)
    alone = {name: load(file) for name, file in files.items()}
    for image, name, one in zip(images, order, found, strict=True):
        same(one, alone[name](image))
        same(tasks(image, name), alone[name](image))
    scores = {name: tasks(images[0], name).score for name in files}
    assert len(set(scores.values())) == 3  # they are three


def test_one_base_is_in_memory(files):
    tasks = load_tasks(files)
    hosts = [dict(tasks[name].host.named_parameters()) for name in files]
    base = read(files['dyt'])['tuned']['base']['tensors']
    assert len(base) > 50
    for name in base:
        assert len({host[name].data_ptr() for host in hosts}) == 1
    own = [{n: p for n, p in host.items() if n not in base} for host in hosts]
    pointers = [p.data_ptr() for one in own for p in one.values()]
    assert len(set(pointers)) == len(pointers)
    numbers = sum(t.numel() for t in tasks.tensors() if isinstance(t, torch.nn.Parameter))
    frozen = sum(hosts[0][name].numel() for name in base)
    assert numbers == frozen + sum(p.numel() for one in own for p in one.values())


def test_tasks_come_and_go(files, images):
    tasks = load_tasks({name: files[name] for name in ('dyt', 'lora')})
    before = tasks(images[0], 'lora').line()
    pointer = tasks['lora'].host.backbone.cls_token.data_ptr()
    tasks.remove('dyt').add('seven', files['seven']).to('cpu')
    assert tasks.names == ['lora', 'seven'] and tasks(images[0], 'lora').line() == before
    assert tasks['seven'].host.backbone.cls_token.data_ptr() == pointer
    tasks['seven'].set_rate(0.5)
    assert tasks(images[0], 'seven').rate == pytest.approx(0.5) and tasks(images[0], 'lora').rate is None


def test_what_is_no_task_is_refused(files, images, tiny_cls_config, pretrained, tmp_path):
    tasks = load_tasks({'dyt': files['dyt']})
    content = torch.load(pretrained)
    content['state_dict'] = {name: tensor * 1.1 for name, tensor in content['state_dict'].items()}
    torch.save(content, tmp_path / 'other.pth')
    options = {'model.backbone.init_cfg.checkpoint': str(tmp_path / 'other.pth')}
    other = tuned_file(tiny_cls_config, tmp_path / 'other', options, 0.0)
    for error, message, call in (
        (
            ValueError,
            'tasks must have one base, got another in .* than in that of .dyt.',
            lambda: tasks.add('b', other),
        ),
        (ValueError, 'must be a tuned-only file', lambda: tasks.add('b', other.with_name('model.pth'))),
        (ValueError, 'name must be a new one', lambda: tasks.add('dyt', files['lora'])),
        (KeyError, r"task must be one of \['dyt'\], got 'cats'", lambda: tasks(images[0], 'cats')),
        (KeyError, 'task must be one of', lambda: tasks(images[:2], ['dyt', 'cats'])),
        (ValueError, 'one for each of the inputs, got 2 for 3', lambda: tasks(images[:3], ['dyt', 'dyt'])),
        (ValueError, 'got 1 for one', lambda: tasks(images[0], ['dyt'])),
    ):
        with pytest.raises(error, match=message):
            call()
    assert tasks.names == ['dyt']


def test_the_command_tells_memory_and_time(files, run_tool, capfd):
    run_tool('benchmark_tasks', *files.values(), '--batch-size', 2, '--repeats', 1, '--device', 'cpu')
    told = capfd.readouterr().out
    one, apart = (float(told.split(words)[1].split()[0]) for words in ('one base', 'separate models'))
    assert '3 tasks, a mixed batch of 6' in told and one < 0.7 * apart
    assert float(told.split('at most ')[1].split()[0].rstrip('.')) < 1e-5
