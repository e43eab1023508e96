"""tools/convert_vit.py on timm's layout: what it converts computes the same; what it cannot convert it refuses."""

import contextlib
import io
import os
import pickle
from pathlib import Path

import mmpretrain.models  # noqa: F401  fills the registry
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_tool
from mmengine.runner import load_checkpoint
from mmpretrain.models.backbones import VisionTransformer
from mmpretrain.registry import MODELS
from safetensors.torch import save_file

from mmdyt.weights.show import ARCHS, choose_arch
from mmdyt.weights.sizes import Sizes

tool = load_tool('convert_vit')

DIM, DEPTH, HEADS, HIDDEN, PATCH, GRID, CLASSES = 12, 2, 3, 20, 4, 3, 5
ARCH = dict(embed_dims=DIM, num_layers=DEPTH, num_heads=HEADS, feedforward_channels=HIDDEN)


def timm_state(depth=DEPTH, head=True, pre_logits=None):
    """Random weights under the names that timm gives them."""
    generator = torch.Generator().manual_seed(0)
    modules = {'patch_embed.proj': (DIM, 3, PATCH, PATCH), 'norm': (DIM,)}
    for i in range(depth):
        modules |= {
            f'blocks.{i}.norm1': (DIM,),
            f'blocks.{i}.attn.qkv': (3 * DIM, DIM),
            f'blocks.{i}.attn.proj': (DIM, DIM),
            f'blocks.{i}.norm2': (DIM,),
            f'blocks.{i}.mlp.fc1': (HIDDEN, DIM),
            f'blocks.{i}.mlp.fc2': (DIM, HIDDEN),
        }
    if pre_logits:
        modules['pre_logits.fc'] = (pre_logits, DIM)
    if head:
        modules['head'] = (CLASSES, pre_logits or DIM)
    shapes = {'cls_token': (1, 1, DIM), 'pos_embed': (1, GRID**2 + 1, DIM)}
    for name, shape in modules.items():
        shapes |= {f'{name}.weight': shape, f'{name}.bias': shape[:1]}
    return {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def timm_forward(state, images, heads=HEADS):
    """The pre-norm ViT from its definition: class token features and logits."""

    def linear(name, x):
        return F.linear(x, state[f'{name}.weight'], state[f'{name}.bias'])

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f'{name}.weight'], state[f'{name}.bias'], eps=1e-6)

    kernel = state['patch_embed.proj.weight']
    x = F.conv2d(images, kernel, state['patch_embed.proj.bias'], stride=kernel.shape[-1])
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state['cls_token'].expand(len(x), -1, -1), x], dim=1) + state['pos_embed']
    for block in [k.removesuffix('.norm1.bias') for k in state if k.endswith('.norm1.bias')]:
        qkv = linear(f'{block}.attn.qkv', norm(f'{block}.norm1', x))
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        x = x + linear(f'{block}.attn.proj', (attention @ v).transpose(1, 2).flatten(2))
        x = x + linear(f'{block}.mlp.fc2', F.gelu(linear(f'{block}.mlp.fc1', norm(f'{block}.norm2', x))))
    features = norm('norm', x)[:, 0]
    hidden = linear('pre_logits.fc', features).tanh() if 'pre_logits.fc.weight' in state else features
    return features, linear('head', hidden) if 'head.weight' in state else None


def build_classifier(hidden_dim=None, **kwargs):
    head = dict(type='VisionTransformerClsHead', num_classes=CLASSES, in_channels=DIM, hidden_dim=hidden_dim)
    backbone = dict(type='VisionTransformer', arch=ARCH, img_size=GRID * PATCH, patch_size=PATCH)
    return MODELS.build(dict(type='ImageClassifier', backbone=backbone, head=head) | kwargs).eval()


def convert_file(*args):
    """What the tool prints. No capsys: mmengine's logger would keep its stream beyond the test."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        tool.main([str(arg) for arg in args])
    return printed.getvalue()


@pytest.fixture
def images():
    return torch.randn(2, 3, GRID * PATCH, GRID * PATCH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def run(tmp_path):
    """Save `content` as SRC, convert it to DST; returns (checkpoint, what was printed)."""

    def run(content, *options, name='src.pth'):
        src, dst = tmp_path / name, tmp_path / 'dst.pth'
        save_file(content, src) if src.suffix == '.safetensors' else torch.save(content, src)
        printed = convert_file(src, dst, *options)
        return torch.load(dst, weights_only=True), printed

    return run


def refusal(tmp_path, content, *options):
    """The message; nothing may have been written."""
    src, dst = tmp_path / 'src.pth', tmp_path / 'dst.pth'
    torch.save(content, src)
    with pytest.raises(SystemExit) as error:
        tool.main([str(src), str(dst), *options])
    assert [p.name for p in tmp_path.iterdir()] == ['src.pth']
    return str(error.value)


# ---- what it converts


@pytest.mark.parametrize('pre_logits', [None, DIM, 7])
def test_converted_classifier_computes_what_the_timm_model_computes(run, tmp_path, images, pre_logits):
    state = timm_state(pre_logits=pre_logits)
    _, printed = run(state)
    model = build_classifier(hidden_dim=pre_logits)
    load_checkpoint(model, str(tmp_path / 'dst.pth'), strict=True)
    features, logits = timm_forward(state, images)
    with torch.no_grad():
        torch.testing.assert_close(model.extract_feat(images)[-1], features, rtol=0, atol=1e-5)
        torch.testing.assert_close(model(images), logits, rtol=0, atol=1e-5)
    assert 'left out' not in printed
    assert (f'hidden_dim={pre_logits}' in printed) == bool(pre_logits)


def test_converted_backbone_loads_strictly_and_through_init_cfg(run, tmp_path, images):
    state = timm_state(head=False)
    checkpoint, _ = run(state)
    weights = {k.removeprefix('backbone.'): v for k, v in checkpoint['state_dict'].items()}
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'dst.pth'), prefix='backbone.')
    cfg = dict(arch=ARCH, img_size=GRID * PATCH, patch_size=PATCH)
    strict, pretrained = VisionTransformer(**cfg), VisionTransformer(**cfg, init_cfg=init_cfg)
    strict.load_state_dict(weights, strict=True)
    pretrained.init_weights()
    features, _ = timm_forward(state, images)
    for model in (strict, pretrained):
        model.train(False)  # mmengine's backbones return None from it
        with torch.no_grad():
            torch.testing.assert_close(model(images)[-1], features, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    'wrap',
    [
        lambda s: s,
        lambda s: {'model': s, 'epoch': 3},
        lambda s: {'state_dict': {f'module.{k}': v for k, v in s.items()}},
        lambda s: {'model_ema': {'state_dict': s}},
        lambda s: {k: torch.nn.Parameter(v) for k, v in s.items()},
    ],
)
def test_wrappers_are_taken_off(run, wrap):
    state = timm_state()
    plain = tool.convert(state).tensors
    wrapped = run(wrap(state))[0]['state_dict']
    assert plain.keys() == wrapped.keys()
    assert all(torch.equal(wrapped[k], v) for k, v in plain.items())


@pytest.mark.parametrize('name', ['src.pt', 'src.bin', 'src.safetensors'])
def test_every_extension_gives_the_same_weights(run, name):
    state = timm_state()
    converted = run(state, name=name)[0]['state_dict']
    assert all(torch.equal(converted[k], v) for k, v in tool.convert(state).tensors.items())


def test_report_names_sizes_and_what_was_left_out(run):
    checkpoint, printed = run({'model': timm_state(), 'epoch': 3}, '--drop-head')
    assert not [k for k in checkpoint['state_dict'] if k.startswith('head')]
    assert checkpoint['meta'] == dict(
        source='src.pth',
        layout="ViT under timm's names (AugReg, DeiT, DINO, or an encoder of MAE or MoCo v3)",
        **dict(embed_dims=DIM, num_layers=DEPTH, hidden=HIDDEN, in_channels=3, patch_size=PATCH, grid=GRID),
    )
    for part in (
        'embed_dims 12, depth 2, hidden 20, heads unknown',
        'patch 4, image 12, classes none',
        'left out: head.weight (--drop-head)',
        "left out: epoch (stands beside 'model'",
        'img_size=12, patch_size=4',
        'eps=1e-6',
        'num_heads=YOURS',
    ):
        assert part in printed


@pytest.mark.parametrize(
    'change, reason',
    [
        (lambda s: s.pop('head.bias'), "no 'head.bias' beside it"),
        (lambda s: s.pop('pre_logits.fc.bias'), "no 'pre_logits.fc.bias' beside it"),
        (lambda s: s['head.weight'].zero_(), 'a head of zeros'),
    ],
)
def test_unusable_head_is_left_out_and_said(change, reason):
    state = timm_state(pre_logits=7)
    change(state)
    found = tool.convert(state)
    converted, left_out = found.tensors, found.left_out
    assert all(k.startswith('backbone.') for k in converted)
    assert left_out.keys() == {k for k in state if k.startswith(('head', 'pre_logits'))}
    assert all(reason in r for r in left_out.values())


def test_distillation_head_alone_is_left_out():
    head = {'head_dist.weight': torch.ones(CLASSES, DIM), 'head_dist.bias': torch.ones(CLASSES)}
    found = tool.convert(timm_state() | head)
    converted, left_out = found.tensors, found.left_out
    assert 'head.layers.head.weight' in converted
    assert left_out == dict.fromkeys(head, 'distillation head')


def test_views_do_not_bring_their_storage():
    state = timm_state()
    state['norm.bias'] = torch.zeros(10_000)[:DIM]
    assert tool.convert(state).tensors['backbone.ln1.bias'].untyped_storage().nbytes() == 4 * DIM


def test_known_archs_are_those_of_mmpretrain():
    for name, sizes in ARCHS.items():
        arch = VisionTransformer.arch_zoo[name]
        assert sizes == tuple(arch[key] for key in ('embed_dims', 'num_layers', 'feedforward_channels', 'num_heads'))
        assert choose_arch(Sizes(*sizes[:3], 3, 16, 14)) == name
    assert choose_arch(Sizes(*ARCHS['deit-small'][:3], 3, 16, 14), heads=12)['num_heads'] == 12


# ---- what it refuses


@pytest.mark.parametrize(
    'extra, hint',
    [
        ({'layers.0.blocks.0.norm1.weight': torch.ones(1), 'layers.0.x': torch.ones(1)}, 'Swin'),
        ({'dist_token': torch.ones(1, 1, DIM)}, 'distilled DeiT'),
        ({'storage_tokens': torch.ones(1, 4, DIM)}, 'RoPE'),
        ({'blocks.1.attn.q_norm.weight': torch.ones(4)}, 'query-key'),
        ({'backbone.cls_token': torch.ones(1, 1, DIM)}, 'no conversion'),
        ({'head.scale': torch.ones(1)}, 'AugReg'),
        ({'blocks.01.norm1.weight': torch.ones(DIM)}, 'AugReg'),
        ({'blocks.0.attn.relative_position_index': torch.ones(2, dtype=torch.long)}, 'BEiT'),
    ],
)
def test_unknown_tensors_are_refused(tmp_path, extra, hint):
    message = refusal(tmp_path, timm_state() | extra)
    assert f'got {len(extra)} others' in message
    assert repr(next(iter(extra))) in message
    assert hint in message


@pytest.mark.parametrize('name', [k for k in timm_state(depth=1, head=False)])
def test_every_missing_tensor_is_refused(name):
    state = timm_state()
    del state[name]
    with pytest.raises(ValueError, match='SRC must') as error:
        tool.convert(state)
    assert name in str(error.value)


@pytest.mark.parametrize('name', list(timm_state(pre_logits=7)))
@pytest.mark.parametrize(
    'change',
    [lambda t: torch.cat([t, t]), lambda t: t[None], lambda t: t[..., :-1], lambda t: t.flatten()[0], lambda t: t[:0]],
)
def test_every_wrong_shape_is_refused(name, change):
    state = timm_state(pre_logits=7)
    state[name] = change(state[name])
    if name == 'head.weight' and not state[name].numel():
        assert 'head.weight' in tool.convert(state).left_out
        return
    with pytest.raises(ValueError, match=r'must have .*, got'):
        tool.convert(state)


@pytest.mark.parametrize(
    'value, rule',
    [
        (torch.ones(DIM, dtype=torch.int8), 'dense tensor'),
        (torch.ones(DIM).to_sparse(), 'dense tensor'),
        (torch.ones(DIM, device='meta'), 'dense tensor'),
        ([1.0] * DIM, 'dense tensor'),
        (torch.full((DIM,), torch.nan), 'finite'),
        (torch.full((DIM,), torch.inf), 'finite'),
    ],
)
def test_values_that_are_no_weights_are_refused(value, rule):
    with pytest.raises(ValueError, match=rf'blocks.1.norm2.bias must be .*{rule}'):
        tool.convert(timm_state() | {'blocks.1.norm2.bias': value})


@pytest.mark.parametrize('positions, got', [(GRID**2 + 2, '11 positions'), (1, '1 positions')])
def test_position_grid_must_be_square(tmp_path, positions, got):
    message = refusal(tmp_path, timm_state() | {'pos_embed': torch.ones(1, positions, DIM)})
    assert 'pos_embed must hold one class token and a square grid' in message and got in message


def test_gap_in_block_numbers_is_refused(tmp_path):
    state = {k: v for k, v in timm_state(depth=4).items() if not k.startswith('blocks.2.')}
    assert "got 3 without 'blocks.2'" in refusal(tmp_path, state)


@pytest.mark.parametrize('content', [[1], torch.ones(1), {0: torch.ones(1)}, {}, {'model': {}}])
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    assert 'SRC must' in refusal(tmp_path, content)


def test_dict_that_holds_itself_is_refused(tmp_path):
    content = {}
    content['model'] = content
    assert 'SRC must' in refusal(tmp_path, content)


def test_arch_must_match(tmp_path):
    assert '--arch must match the weights' in refusal(tmp_path, timm_state(), '--arch', 'base')


def test_wrong_head_says_how_to_go_on(tmp_path, run):
    state = timm_state() | {'head.weight': torch.ones(CLASSES, DIM + 1)}
    assert '--drop-head' in refusal(tmp_path, state)
    run(state, '--drop-head')


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('dump', [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj, 2))])
def test_unsafe_pickle_is_refused_and_not_run(tmp_path, dump):
    src, fuse = tmp_path / 'src.pth', tmp_path / 'fuse'
    dump({'model': timm_state(), 'args': Bomb(fuse)}, src)
    with pytest.raises(SystemExit, match='SRC must hold tensors only.*bare state_dict'):
        tool.main([str(src), str(tmp_path / 'dst.pth')])
    assert os.listdir(tmp_path) == ['src.pth']
    pickle.loads(pickle.dumps(Bomb(fuse)))
    assert fuse.exists()  # the charge was live


@pytest.mark.parametrize('name', ['src.pth', 'src.safetensors'])
def test_damaged_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b'<html>not found</html>')
    with pytest.raises(SystemExit, match='SRC must hold tensors only'):
        tool.main([str(tmp_path / name), str(tmp_path / 'dst.pth')])


@pytest.mark.parametrize(
    'src, dst, message',
    [
        ('none.pth', 'dst.pth', 'SRC must be a file'),
        ('.', 'dst.pth', 'SRC must be a file'),
        ('src.npz', 'dst.pth', 'SRC must end in'),
        ('src.pth', 'dst.safetensors', 'DST must end in'),
        ('src.pth', 'src.pth', 'DST must differ from SRC'),
        ('src.pth', 'link.pth', 'DST must differ from SRC'),
        ('src.pth', 'folder.pth', 'DST must not exist yet.*a folder'),
    ],
)
def test_bad_paths_are_refused(tmp_path, src, dst, message):
    torch.save(timm_state(), tmp_path / 'src.pth')
    (tmp_path / 'src.npz').touch()
    (tmp_path / 'link.pth').symlink_to('src.pth')
    (tmp_path / 'folder.pth').mkdir()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(SystemExit, match=message):
        tool.main([str(tmp_path / src), str(tmp_path / dst), '--force'])
    assert sorted(os.listdir(tmp_path)) == before
    tool.convert(torch.load(tmp_path / 'src.pth'))


def test_existing_file_is_overwritten_only_by_force(run, tmp_path):
    (tmp_path / 'dst.pth').write_text('mine')
    with pytest.raises(SystemExit, match='DST must not exist yet.*--force'):
        run(timm_state())
    assert (tmp_path / 'dst.pth').read_text() == 'mine'
    assert 'state_dict' in run(timm_state(), '--force')[0]


def test_failed_write_leaves_the_old_file(run, tmp_path, monkeypatch):
    def fail(checkpoint, file):
        file.write(b'half')
        raise OSError('disk full')

    torch.save(timm_state(), tmp_path / 'src.pth')
    (tmp_path / 'dst.pth').write_text('mine')
    monkeypatch.setattr(tool.torch, 'save', fail)
    with pytest.raises(SystemExit, match='disk full'):
        tool.main([str(tmp_path / 'src.pth'), str(tmp_path / 'dst.pth'), '--force'])
    assert sorted(os.listdir(tmp_path)) == ['dst.pth', 'src.pth']
    assert (tmp_path / 'dst.pth').read_text() == 'mine'


# ---- real weights


def test_the_former_name_of_the_tool_does_the_same(tmp_path):
    torch.save(timm_state(), tmp_path / 'src.pth')
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        load_tool('convert_timm_vit').main([str(tmp_path / 'src.pth'), str(tmp_path / 'dst.pth')])
    assert 'embed_dims 12' in printed.getvalue() and (tmp_path / 'dst.pth').is_file()


@pytest.mark.skipif('MMDYT_DATA' not in os.environ, reason='MMDYT_DATA is unset: no real weights')
def test_real_vit_tiny_reproduces_its_reference(tmp_path):
    weights = Path(os.environ['MMDYT_DATA']) / 'weights'
    src, dst = weights / 'vit_tiny_patch16_224_augreg_in21k_ft_in1k.pth', tmp_path / 'vit_tiny.pth'
    assert "arch='deit-tiny', img_size=224, patch_size=16" in convert_file(src, dst, '--arch', 'deit-tiny')
    model = build_classifier(
        backbone=dict(type='VisionTransformer', arch='deit-tiny', norm_cfg=dict(type='LN', eps=1e-6)),
        head=dict(type='VisionTransformerClsHead', num_classes=1000, in_channels=192),
    )
    load_checkpoint(model, str(dst), strict=True)
    reference = np.load(weights / 'reference_outputs.npz')
    images = torch.from_numpy(reference['inputs']).float()
    with torch.no_grad():
        features = model.extract_feat(images)
        by_mmpretrain = features[-1], model.head(features)
        by_definition = timm_forward(torch.load(src, weights_only=True), images, heads=3)
    for name, output, defined in zip(('cls_features', 'logits'), by_mmpretrain, by_definition, strict=True):
        for expected in (torch.from_numpy(reference[name]), defined):
            error = ((output - expected).abs().max() / expected.abs().max()).item()
            print(f'{name}: max abs error / max abs value = {error:.1e}')
            assert error <= 1e-3


def test_the_folder_of_dst_is_made(tmp_path):
    src, dst = tmp_path / 'src.pth', tmp_path / 'pretrain' / 'new' / 'dst.pth'
    torch.save(timm_state(), src)
    tool.main([str(src), str(dst)])
    assert dst.is_file()
