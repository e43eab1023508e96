"""LoRA files of PEFT: what they compute is W + s B A by hand, and they come back as they went."""

import json
import math

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from predicting import make_checkpoint
from safetensors.torch import load_file, save_file

from mmdyt.apis import load
from mmdyt.tuned.file import read

MODULES = {
    'attention.attention.query': (32, 32),
    'attention.attention.value': (32, 32),
    'attention.output.dense': (32, 32),
    'intermediate.dense': (64, 32),
    'output.dense': (32, 64),
}
NONE = {'model.backbone.adapter': None, 'model.backbone.dispatcher': None}


def peft_folder(folder, rank=4, head=True, **config):
    """As PEFT saves a LoRA of Hugging Face's ViTForImageClassification of 4 layers."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    tensors = {}
    for layer in range(4):
        for module, (out, read_) in MODULES.items():
            start = f'base_model.model.vit.encoder.layer.{layer}.{module}'
            tensors[f'{start}.lora_A.weight'] = torch.randn(rank, read_) / 6
            tensors[f'{start}.lora_B.weight'] = torch.randn(out, rank) / 6
    if head:
        tensors |= {'base_model.model.classifier.weight': torch.randn(3, 32),
                    'base_model.model.classifier.bias': torch.randn(3)}  # fmt: skip
    save_file(tensors, folder / 'adapter_model.safetensors')
    known = dict(peft_type='LORA', r=rank, lora_alpha=16, lora_dropout=0.0, target_modules=['query', 'value', 'dense'])
    (folder / 'adapter_config.json').write_text(json.dumps(known | config))
    return folder, tensors


@pytest.mark.parametrize(
    ('config', 'scales'),
    [
        ({}, {'': 4.0}),
        ({'use_rslora': True}, {'': 16 / math.sqrt(4)}),
        (
            {'alpha_pattern': {'value': 2, r'layer\.0\.output\.dense': 1}},
            {'': 4.0, 'value': 0.5, '0.output.dense': 0.25},
        ),
    ],
)
def test_an_imported_model_computes_w_plus_s_b_a(config, scales, tiny_cls_config, pretrained, run_tool, tmp_path):
    folder, tensors = peft_folder(tmp_path / 'peft', **config)
    out = tmp_path / 'x.safetensors'
    run_tool('peft_lora', 'import', tiny_cls_config, folder, out)
    model = load(out)
    cfg = Config.fromfile(tiny_cls_config).model.backbone
    stock = MODELS.build(
        dict(type='mmpretrain.VisionTransformer', arch=cfg.arch, img_size=32, patch_size=16, init_cfg=cfg.init_cfg)
    )
    stock.init_weights()
    stock.eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = stock(images)[0]
    weights = dict(stock.named_parameters())
    for layer in range(4):
        for module in MODULES:
            place = dict(query='attn.qkv', value='attn.qkv').get(module.split('.')[-1]) or {
                'attention.output.dense': 'attn.proj', 'intermediate.dense': 'ffn.layers.0.0',
                'output.dense': 'ffn.layers.1'}[module]  # fmt: skip
            start = f'base_model.model.vit.encoder.layer.{layer}.{module}'
            ends = [end for end in scales if f'{layer}.{module}'.endswith(end)]
            scale = scales[max(ends, key=len)]
            update = scale * tensors[f'{start}.lora_B.weight'] @ tensors[f'{start}.lora_A.weight']
            rows = dict(query=slice(0, 32), value=slice(64, 96)).get(module.split('.')[-1], slice(None))
            with torch.no_grad():
                weights[f'layers.{layer}.{place}.weight'][rows] += update
    with torch.no_grad():
        wanted = stock(images)[0]
        got = model.host.backbone(images)[0]
        assert float((wanted - plain).abs().max()) > 0.1
        torch.testing.assert_close(got, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)
        linear = tensors['base_model.model.classifier.weight'], tensors['base_model.model.classifier.bias']
        torch.testing.assert_close(model.host.head((got,)), torch.nn.functional.linear(got, *linear))


def test_files_come_back_as_they_went(tiny_cls_config, run_tool, tmp_path, capfd):
    folder, tensors = peft_folder(tmp_path / 'peft', alpha_pattern={'value': 2})
    run_tool('peft_lora', 'import', tiny_cls_config, folder, tmp_path / 'x.safetensors')
    run_tool('peft_lora', 'export', tmp_path / 'x.safetensors', tmp_path / 'back', '--base', 'google/vit')
    back = load_file(tmp_path / 'back/adapter_model.safetensors')
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in back)
    config = json.loads((tmp_path / 'back/adapter_config.json').read_text())
    assert (config['r'], config['lora_alpha'], config['base_model_name_or_path']) == (4, 16, 'google/vit')
    assert set(config['alpha_pattern'].values()) == {2} and len(config['alpha_pattern']) == 4
    assert len(config['target_modules']) == 20 and config['modules_to_save'] == ['classifier']
    run_tool('peft_lora', 'import', tiny_cls_config, tmp_path / 'back', tmp_path / 'y.safetensors')
    one, other = (read(tmp_path / name)['state_dict'] for name in ('x.safetensors', 'y.safetensors'))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_update_of_all_rows_becomes_three(tiny_cls_config, run_tool, tmp_path):
    parts = [dict(type='mmdyt.LoRA', on='attn.qkv', rank=2, scale=0.5)]
    checkpoint = make_checkpoint(tiny_cls_config, tmp_path, options=NONE | {'model.backbone.parts': parts})
    content = torch.load(checkpoint)
    for name, tensor in content['state_dict'].items():
        if name.endswith('lora.qkv.up'):
            tensor.normal_()
    torch.save(content, checkpoint)
    run_tool('peft_lora', 'export', checkpoint, tmp_path / 'peft')
    run_tool('peft_lora', 'import', tiny_cls_config, tmp_path / 'peft', tmp_path / 'x.safetensors')
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        one, other = (load(path).host.backbone(images)[0] for path in (checkpoint, tmp_path / 'x.safetensors'))
    torch.testing.assert_close(one, other, atol=1e-5 * float(one.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (dict(peft_type='IA3'), "peft_type must be LORA, got 'IA3'"),
        (dict(use_dora=True), 'use_dora must be False'),
        (dict(bias='all'), "bias must be 'none'"),
        (dict(init_lora_weights='pissa'), 'init_lora_weights must leave the base as it is'),
    ],
)
def test_what_is_no_plain_lora_is_refused(config, message, tiny_cls_config, run_tool, tmp_path, capfd):
    folder, _ = peft_folder(tmp_path / 'peft', **config)
    with pytest.raises(SystemExit) as exit_info:
        run_tool('peft_lora', 'import', tiny_cls_config, folder, tmp_path / 'x.safetensors')
    assert exit_info.value.code == 2 and message in capfd.readouterr().err and not (tmp_path / 'x.safetensors').exists()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda t: {'base_model.model.vit.pooler.dense.lora_A.weight': torch.zeros(2, 2)}, 'got vit.pooler.dense'),
        (lambda t: {'base_model.model.vit.layernorm.weight': torch.zeros(2)}, 'must be of LoRA or a classifier'),
        (lambda t: {'base_model.model.classifier.weight': torch.zeros(5, 32)}, 'of another shape'),
        (lambda t: {name: tensor[:, :8] for name, tensor in t.items() if 'query.lora_A' in name}, 'of another shape'),
        (lambda t: {name.replace('r.3.', 'r.9.'): t[name] for name in t if 'r.3.' in name}, 'layers'),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message, tiny_cls_config, run_tool, tmp_path, capfd):
    folder, tensors = peft_folder(tmp_path / 'peft')
    save_file(
        {name: t.clone() for name, t in (tensors | change(tensors)).items()}, folder / 'adapter_model.safetensors'
    )
    with pytest.raises(SystemExit) as exit_info:
        run_tool('peft_lora', 'import', tiny_cls_config, folder, tmp_path / 'x.safetensors')
    assert exit_info.value.code == 2 and message in capfd.readouterr().err


def test_export_refuses_what_is_more_than_lora(tiny_cls_config, run_tool, tmp_path, capfd):
    for i, options in enumerate(({}, NONE | {'model.backbone.parts': [dict(type='mmdyt.LoRA')],
                                             'model.backbone.tuned': ['parts', 'ln1']})):  # fmt: skip
        checkpoint = make_checkpoint(tiny_cls_config, tmp_path, options=options)
        with pytest.raises(SystemExit) as exit_info:
            run_tool('peft_lora', 'export', checkpoint, tmp_path / f'out{i}')
        assert exit_info.value.code == 2 and 'model must ' in capfd.readouterr().err
        assert not (tmp_path / f'out{i}').exists()
