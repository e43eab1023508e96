"""tools/merge.py: what merges is folded, what does not stays, and outputs are equal."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from predicting import make_checkpoint

from mmdyt.apis import load
from mmdyt.core.part import parts

NONE = {'model.backbone.adapter': None, 'model.backbone.dispatcher': None}
METHODS = {
    'lora': [dict(type='mmdyt.LoRA', rank=4, scale=0.5)],
    'ssf': [dict(type='mmdyt.SSF', official=True)],
    'ether': [dict(type='mmdyt.ETHER')],
    'ether_plus': [dict(type='mmdyt.ETHERPlus')],
}


def drawn(config: Path, folder: Path, options: dict) -> Path:
    """A checkpoint whose parts all do something."""
    path = make_checkpoint(config, folder, options=options)
    content = torch.load(path)
    torch.manual_seed(1)
    for name, tensor in content['state_dict'].items():
        if '.lora.' in name:
            tensor.normal_(std=0.1)
    torch.save(content, path)
    return path


@pytest.mark.parametrize('method', METHODS)
def test_a_merged_network_is_a_plain_one(method, tiny_cls_config, run_tool, tmp_path, capfd):
    checkpoint = drawn(tiny_cls_config, tmp_path, NONE | {'model.backbone.parts': METHODS[method]})
    out = tmp_path / 'plain.pth'
    images = sorted(tiny_cls_config.parent.glob('test*.png'))[:3]
    run_tool('merge', checkpoint, out, '--strip', '--images', *images)
    told = capfd.readouterr().out
    assert 'Left: nothing, 0.000 M' in told and 'on 3 inputs' in told
    line = next(line for line in told.splitlines() if line.startswith('backbone='))
    backbone = eval(line.removeprefix('backbone='))
    assert backbone['type'] == 'mmpretrain.VisionTransformer' and backbone['init_cfg']['checkpoint'] == str(out)
    stock = MODELS.build(backbone)
    stock.init_weights()
    stock.eval()
    model = load(checkpoint)
    seen = {}
    model.host.backbone.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output[0]))
    model(str(images[0]))
    assert type(stock).__module__.startswith('mmpretrain.')
    with torch.no_grad():
        torch.testing.assert_close(stock(seen['x'])[0], seen['y'], rtol=0, atol=1e-4 * float(seen['y'].abs().max()))


@pytest.mark.parametrize('task', ['tiny_cls_config', 'tiny_config', 'tiny_video_config'])
def test_adapters_and_dispatchers_stay(task, request, run_tool, tmp_path, capfd):
    config = request.getfixturevalue(task)
    checkpoint = drawn(config, tmp_path, {'model.backbone.parts': METHODS['lora']})
    out = tmp_path / 'merged.pth'
    run_tool('merge', checkpoint, out)
    told = capfd.readouterr().out
    assert 'Folded: 8 LoRA(scale=0.5).' in told and '4 Adapter' in told and '4 TokenDispatcher' in told
    before, after = load(checkpoint), load(out)
    assert {part.word for part in parts(after.host)} == {'adapter', 'dispatcher'}
    shape = dict(tiny_video_config=(16, 40, 40, 3)).get(task, (64, 64, 3))
    image = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    one, other = before(image), after(image)
    assert other.gmacs < one.gmacs and one.rates == other.rates
    np.testing.assert_allclose([s.score for s in one.top], [s.score for s in other.top], atol=1e-4)
    again = load(out, Config.fromfile(tmp_path / 'merged.py'))
    assert again(image).line() == other.line()


def test_a_tuned_only_file_is_merged(tiny_cls_config, run_tool, tmp_path):
    checkpoint = drawn(tiny_cls_config, tmp_path, NONE | {'model.backbone.parts': METHODS['lora']})
    run_tool('tuned', 'extract', checkpoint, tmp_path / 'x.safetensors')
    run_tool('merge', checkpoint, tmp_path / 'a.pth')
    run_tool('merge', tmp_path / 'x.safetensors', tmp_path / 'b.pth')
    one, other = (torch.load(tmp_path / name)['state_dict'] for name in ('a.pth', 'b.pth'))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_refusals_write_nothing(tiny_cls_config, run_tool, tmp_path, capfd):
    plain = make_checkpoint(tiny_cls_config, tmp_path)
    (tmp_path / 'l').mkdir()
    both = drawn(tiny_cls_config, tmp_path / 'l', {'model.backbone.parts': METHODS['lora']})
    out = tmp_path / 'out.pth'
    for words, *args in (
        ('model must have rewrites to merge', plain, out),
        (
            '--strip must find a model without parts, got 4 Adapter(scale=1), 4 TokenDispatcher left',
            both,
            out,
            '--strip',
        ),
        ('OUT must end in .pth', both, tmp_path / 'x.safetensors'),
        ('OUT must name another file', both, both),
        ('must come with a config file', both, out, '--method', 'lora'),
    ):
        with pytest.raises(SystemExit) as exit_info:
            run_tool('merge', *args)
        assert exit_info.value.code == 2 and words in capfd.readouterr().err
    assert not out.exists()


def test_a_merged_model_that_is_another_is_not_written(tiny_cls_config, run_tool, tmp_path, monkeypatch):
    from mmdyt.parts.lora import LoRA

    checkpoint = drawn(tiny_cls_config, tmp_path, NONE | {'model.backbone.parts': METHODS['lora']})
    monkeypatch.setattr(LoRA, 'merged', lambda self, weight, bias: (weight, bias))
    with pytest.raises(SystemExit):
        run_tool('merge', checkpoint, tmp_path / 'out.pth')
    assert not (tmp_path / 'out.pth').exists()
