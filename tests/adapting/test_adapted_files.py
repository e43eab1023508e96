"""Files of what was tuned go round, and into nothing else."""

import pytest
import torch
from library_vits import VITS, TimmViT, images, scrambled
from test_adapt import adapted, loss_of

import mmdyt

ENDINGS = ['.safetensors', '.pth']


def needs(ending):
    if ending == '.safetensors':
        pytest.importorskip('safetensors', reason='safetensors is not installed')


@pytest.mark.parametrize('ending', ENDINGS)
@pytest.mark.parametrize('kind', VITS)
@pytest.mark.parametrize('method', ['dyt', 'evidence', 'lora'])
def test_a_file_gives_the_same_bit_for_bit(tmp_path, kind, method, ending):
    needs(ending)
    rate, path = (None if method == 'lora' else 0.5), tmp_path / f'tuned{ending}'
    model = adapted(kind, method, rate)
    if method == 'evidence':
        model.fit([images(4)], loss_of)
    model.save(path)
    other = mmdyt.adapt(scrambled(VITS[kind]()), method, None if method == 'lora' else 0.25)
    other.load(path)
    with torch.no_grad():
        assert torch.equal(other(images()), model(images()))
    assert other.rate == rate and list(tmp_path.iterdir()) == [path]


def test_the_base_is_not_in_the_file(tmp_path):
    model = adapted('timm', 'dyt', 0.5)
    model.save(tmp_path / 'tuned.pth')
    names = torch.load(tmp_path / 'tuned.pth', weights_only=True)['tensors'].keys()
    assert all('.dynamic.' in name or name.startswith('head.') for name in names)
    assert {'head.weight', 'blocks.0.dynamic.mlp.dispatcher.gate.weight'} <= names
    assert 'blocks.0.dynamic.mlp.dispatcher.capacity' in names


def broken(path):
    path.write_bytes(path.read_bytes()[:100])


def larger():
    vit = scrambled(TimmViT())
    vit.pos_embed = torch.nn.Parameter(torch.zeros(1, 26, 16))
    return vit


def retrained():
    vit = scrambled(TimmViT())
    vit.blocks[1].mlp.fc1.weight.data[0, 0] += 0.01
    return vit


def with_classes(number):
    vit = scrambled(TimmViT())
    vit.head = torch.nn.Linear(16, number)
    return vit


def plain():
    return scrambled(TimmViT())


WRONG = {
    'another method': (plain, dict(method='adapter'), None, 'method must be that of tuned'),
    'another option': (plain, dict(method='lora', rank=4), None, 'method must be that of tuned'),
    'another base': (larger, {}, None, 'the frozen tensors that tuned.* another pos_embed'),
    'other values': (retrained, {}, None, 'another blocks.1.mlp.fc1.weight'),
    'another head': (lambda: with_classes(7), {}, None, r'got head.bias of \(5,\), not \(7,\)'),
    'truncated': (plain, {}, broken, 'path must name a whole file'),
}  # fmt: skip


@pytest.mark.parametrize('ending', ENDINGS)
@pytest.mark.parametrize(('build', 'options', 'spoil', 'said'), WRONG.values(), ids=WRONG)
def test_a_wrong_file_changes_nothing(tmp_path, build, options, spoil, said, ending):
    needs(ending)
    path = tmp_path / f'tuned{ending}'
    adapted('timm', 'lora').save(path)
    if spoil is not None:
        spoil(path)
    model = mmdyt.adapt(build(), **{'method': 'lora', **options})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        model.load(path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_a_base_in_half_precision_is_the_same(tmp_path):
    adapted('timm', 'lora').save(tmp_path / 'tuned.pth')
    vit = scrambled(TimmViT())
    for parameter in vit.parameters():
        parameter.copy_(parameter.bfloat16().float())
    mmdyt.adapt(vit, 'lora').load(tmp_path / 'tuned.pth')


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere'):
        adapted('timm', 'lora').load(tmp_path / 'nowhere.pth')


def test_another_checkpoint_is_none_of_ours(tmp_path):
    torch.save(dict(state_dict={}), tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='Adapted.save wrote'):
        adapted('timm', 'lora').load(tmp_path / 'other.pth')
