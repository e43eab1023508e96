"""Files of what was tuned alone, and their base: sizes, predictions, refusals."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from predicting import make_checkpoint

from mmdyt.apis import load
from mmdyt.engine.shapes import shapes_only
from mmdyt.preflight.checkpoints import check_fit, read_checkpoint, read_tensors
from mmdyt.preflight.methods import use_method
from mmdyt.tuned.file import is_whole, read, write
from mmdyt.tuned.model import complete, kept_names, tuned_only

ROOT = Path(__file__).parents[2]
TASKS = dict(cls='tiny_cls_config', seg='tiny_config', video='tiny_video_config')


def model_of(config: Path, **options):
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(options)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model)


def extract(config: Path, folder: Path, **options) -> tuple[Path, Path]:
    """A whole checkpoint, and the tuned-only file of it."""
    whole = make_checkpoint(config, folder, options=options)
    out = folder / 'tuned.safetensors'
    write(tuned_only(model_of(config, **options), torch.load(whole)), out)
    return whole, out


def input_of(task: str, config: Path, request) -> str:
    folder = request.getfixturevalue('ade_root') / 'images/validation' if task == 'seg' else config.parent
    return str(sorted(folder.rglob('*.mp4' if task == 'video' else '*.png'))[0])


@pytest.mark.parametrize('task', TASKS)
def test_a_file_and_its_base_predict_what_the_checkpoint_does(task, request, tmp_path):
    config = request.getfixturevalue(TASKS[task])
    whole, out = extract(config, tmp_path)
    assert not any(name.startswith('backbone.layers.0.attn') for name in read(out)['state_dict'])
    one, other = load(whole), load(out)  # the config is in the file, too
    states = one.host.state_dict(), other.host.state_dict()
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    path = input_of(task, config, request)
    assert one(path).line() == other(path).line() and one.classes == other.classes == ('red', 'green', 'blue')


def test_what_the_base_does_not_give_is_in_the_file(tiny_config, tmp_path):
    """The base has 2 x 2 positions, the model of the segmentor 4 x 4."""
    _, out = extract(tiny_config, tmp_path)
    assert 'backbone.pos_embed' in read(out)['state_dict'] and 'backbone.cls_token' not in read(out)['state_dict']
    assert any(name.endswith('running_mean') for name in read(out)['state_dict'])


def test_thresholds_and_capacities_are_in_the_file(tiny_cls_config, tmp_path):
    whole = make_checkpoint(tiny_cls_config, tmp_path, capacities=[0.9, 0.7, 0.5, 0.3])
    content = tuned_only(model_of(tiny_cls_config), torch.load(whole))
    names = [name for name in content['state_dict'] if name.endswith(('.capacity', '.threshold'))]
    assert len([name for name in names if 'capacity' in name]) == 4
    write(content, tmp_path / 'x.safetensors')
    assert not load(tmp_path / 'x.safetensors').equal_shares


@pytest.mark.parametrize(
    'method', ['full', 'bitfit', 'linear', 'ssf', 'vpt_deep', 'adapter_plus', 'lora+evidence', 'tome']
)
def test_every_method_comes_back(method, tiny_cls_config, tmp_path):
    cfg = Config.fromfile(tiny_cls_config)
    use_method(cfg, method)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model, fresh = MODELS.build(cfg.model), MODELS.build(cfg.model)
    load_checkpoint(model.backbone, cfg.model.backbone.init_cfg.checkpoint, revise_keys=[('^backbone.', '')])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or 'dynamic' in name:
            torch.nn.init.normal_(parameter)
    found = tuned_only(model, dict(state_dict=model.state_dict()))
    left = len(found['tuned']['base']['tensors'])
    assert (left == 0) == (method == 'full') and left + len(found['state_dict']) == len(model.state_dict())
    write(found, tmp_path / 'x.safetensors')
    load_checkpoint(fresh, str(tmp_path / 'x.safetensors'))
    states = model.state_dict(), fresh.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(('config', 'megabytes'), [('vitti_cifar100_1k', 1.5), ('vitb_cifar100', 6.0)])
def test_files_are_small(config, megabytes, tmp_path):
    with shapes_only():
        model = model_of(ROOT / f'configs/dyt/{config}.py')
    state = model.state_dict()
    tuned = kept_names(model)
    content = dict(state_dict={name: torch.zeros(state[name].shape, dtype=state[name].dtype) for name in tuned})
    hashes = {name: ['0' * 16] * 3 for name in state if name not in tuned}
    meta = dict(cfg=Config.fromfile(ROOT / f'configs/dyt/{config}.py').pretty_text)
    content |= dict(meta=meta, tuned=dict(base=dict(tensors=hashes)))
    write(content, tmp_path / 'x.safetensors')
    size = (tmp_path / 'x.safetensors').stat().st_size / 1e6
    assert 0.8 * megabytes < size < megabytes
    if config == 'vitb_cifar100':
        assert {'backbone.pos_embed', 'backbone.cls_token'} <= hashes.keys()


def test_logits_of_a_vit_tiny_are_the_same_bit_for_bit(tmp_path):
    """On a base of random weights, in the shape of the published one."""
    options = {'model.backbone.init_cfg.checkpoint': str(tmp_path / 'base.pth')}
    config = ROOT / 'configs/dyt/vitti_cifar100_1k.py'
    torch.manual_seed(0)
    model = model_of(config, **options).eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not name.endswith(('threshold', 'capacity')):
            tensor.normal_(std=0.02)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = kept_names(model)
    torch.save(dict(state_dict={n: t for n, t in state.items() if n not in kept}), tmp_path / 'base.pth')
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        wanted = model(images)
    out = tmp_path / 'x.safetensors'
    write(tuned_only(model, dict(state_dict=state)), out)
    assert out.stat().st_size < 1.5e6
    fresh = model_of(config, **options).eval()
    load_checkpoint(fresh, str(out))  # mmengine's own, with nothing but compat
    with torch.no_grad():
        assert torch.equal(fresh(images), wanted)


def other_base(pretrained: Path, folder: Path, change) -> Path:
    content = torch.load(pretrained)
    content['state_dict'] = {name: change(tensor) for name, tensor in content['state_dict'].items()}
    torch.save(content, folder / 'other.pth')
    return folder / 'other.pth'


@pytest.mark.parametrize('change', [lambda t: t.half(), lambda t: t.bfloat16(), lambda t: t.double()])
def test_a_base_that_was_saved_again_passes(change, tiny_cls_config, pretrained, tmp_path):
    _, out = extract(tiny_cls_config, tmp_path)
    path = other_base(pretrained, tmp_path, change)
    model = model_of(tiny_cls_config, **{'model.backbone.init_cfg.checkpoint': str(path)})
    check_fit(model, read_tensors(str(out)), str(out), exact=True)


REFUSED = {
    'base': ('base must be that on which .*tuned.safetensors was tuned, .* got .*other.pth: of its .* differ, first',
             lambda request, tmp_path: {'model.backbone.init_cfg.checkpoint': str(
                 other_base(request.getfixturevalue('pretrained'), tmp_path, lambda t: t * 1.01))}),
    'no base': ('got none in init_cfg: .* are missing', lambda *_: {'model.backbone.init_cfg': None}),
    'method': (r"checkpoint must be of the model's method, got 4 Adapter\(scale=1\), 4 TokenDispatcher in "
               '.*tuned.safetensors for a model with 8 LoRA',
               lambda *_: {'model.backbone.adapter': None, 'model.backbone.dispatcher': None,
                           'model.backbone.parts': [dict(type='mmdyt.LoRA')]}),
    'scale': (r'for a model with 4 Adapter\(scale=0.1\)', lambda *_: {'model.backbone.adapter.scale': 0.1}),
    'shapes': ('of another shape', lambda *_: {'model.backbone.adapter.bottleneck': 8}),
    'classes': ('of another shape, first head', lambda *_: {'model.head.num_classes': 7}),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSED)
def test_what_does_not_fit_is_refused_by_name(case, request, tiny_cls_config, tmp_path):
    _, out = extract(tiny_cls_config, tmp_path)
    message, options = REFUSED[case]
    model = model_of(tiny_cls_config, **options(request, tmp_path))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        check_fit(model, read_tensors(str(out)), str(out), exact=True)
    if case in ('base', 'no base', 'method', 'scale'):  # before anything is loaded
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        with pytest.raises(ValueError, match=message):
            load_checkpoint(model, str(out))


@pytest.mark.parametrize('length', [0, 5, 300, -1])
def test_a_truncated_file_is_refused_by_name(length, tiny_cls_config, tmp_path):
    _, out = extract(tiny_cls_config, tmp_path)
    assert is_whole(out)
    out.write_bytes(out.read_bytes()[:length])
    assert not is_whole(out)
    with pytest.raises(ValueError, match='got .*tuned.safetensors: it is broken'):
        read_checkpoint(str(out))


def test_a_flipped_bit_is_noticed(tiny_cls_config, tmp_path):
    _, out = extract(tiny_cls_config, tmp_path)
    content = bytearray(out.read_bytes())
    content[-7] ^= 1
    out.write_bytes(content)
    with pytest.raises(ValueError, match='got .*tuned.safetensors: it is broken'):
        read_checkpoint(str(out))


def test_a_base_that_is_gone_is_named(tiny_cls_config, tmp_path):
    _, out = extract(tiny_cls_config, tmp_path)
    model = model_of(tiny_cls_config, **{'model.backbone.init_cfg.checkpoint': 'gone.pth'})
    with pytest.raises(FileNotFoundError, match='base must lie where init_cfg says, got no file gone.pth'):
        check_fit(model, read_tensors(str(out)), str(out), exact=True)


def test_a_file_of_a_later_version_is_refused(tiny_cls_config, tmp_path):
    _, out = extract(tiny_cls_config, tmp_path)
    content = out.read_bytes().replace(rb'{\"version\": 1,', rb'{\"version\": 2,')
    out.write_bytes(content)
    with pytest.raises(ValueError, match='version 1, got 2'):
        read(out)


def test_the_header_says_all_there_is_to_know(tiny_cls_config, tmp_path):
    _, out = extract(tiny_cls_config, tmp_path)
    content = out.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], 'little')])
    about = json.loads(header['__metadata__']['mmdyt'])
    assert about['tuned']['method'] == {'Adapter(scale=1)': 4, 'TokenDispatcher': 4}
    assert about['tuned']['input'] == dict(size=[32, 32], mean=[127.5] * 3, std=[127.5] * 3)
    assert about['meta']['dataset_meta']['classes'] == ['red', 'green', 'blue']


def test_a_tuned_file_is_no_base(tiny_cls_config, tmp_path):
    _, out = extract(tiny_cls_config, tmp_path)
    model = model_of(tiny_cls_config, **{'model.backbone.init_cfg.checkpoint': str(out)})
    with pytest.raises(ValueError, match='base must be whole, got .*tuned.safetensors'):
        complete(model, read(out))
    with pytest.raises(ValueError, match='checkpoint must be a whole base'):
        read_tensors(str(out), prefix='backbone.')


def test_a_file_that_comes_from_anybody_fetches_nothing(tiny_cls_config, tmp_path):
    _, out = extract(tiny_cls_config, tmp_path)
    content = read(out)
    cfg = Config.fromfile(tiny_cls_config)
    cfg.model.backbone.init_cfg.checkpoint = 'http://example.com/base.pth'
    content['meta']['cfg'] = cfg.pretty_text
    write(content, out)
    with pytest.raises(ValueError, match='must be a local file'):
        load(out)
