"""A network in memory gets parts and computes what it did; timm's and Hugging Face's names, written out by hand."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from library_vits import VITS, HFViT, TimmBlock, TimmViT, images, scrambled

import mmdyt
from mmdyt.adapting.methods import METHODS
from mmdyt.core.branch import NothingSkippedWarning
from mmdyt.core.losses import activation_rate, rate_loss
from mmdyt.core.macs import count_macs
from mmdyt.core.observe import complete_model, record_dispatch, unreduced
from mmdyt.core.part import parts
from mmdyt.parts.lora import LoRA

CHANGED_AT_THE_START = {'adapter_plus', 'vpt_shallow', 'vpt_deep', 'ether', 'ether_plus'}
SITES = [('mlp', 'active'), ('attn', 'active'), ('attn_mlp', 'all'), ('layer', 'active'), ('layer', 'all')]


def stirred(model, seed=2):
    """The same model, its parts no more those of the start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in parts(model):
            for parameter in part.parameters(recurse=False):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            for module in part.children():
                for parameter in module.parameters():
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(kind='timm', *args, **options):
    return stirred(mmdyt.adapt(scrambled(VITS[kind]()), *args, **options))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))


def loss_of(model, batch):
    return F.cross_entropy(model(batch), torch.arange(len(batch)) % 5)


@pytest.mark.parametrize('kind', VITS)
@pytest.mark.parametrize('method', sorted(METHODS.keys() - CHANGED_AT_THE_START))
def test_the_complete_model_is_the_original(kind, method):
    vit, x = scrambled(VITS[kind]()), images()
    with torch.no_grad():
        expected = vit(x)
        model = mmdyt.adapt(vit, method)
        with complete_model(model), unreduced(model):
            assert expected.std() > 0.05
            close(model(x), expected)


@pytest.mark.parametrize('kind', VITS)
@pytest.mark.parametrize(('dispatch', 'keys'), SITES)
@pytest.mark.parametrize('rate', [None, 0.5])
@torch.no_grad()
def test_packed_equals_masked(kind, dispatch, keys, rate):
    masked = adapted(kind, 'dyt', rate, dispatch=dispatch, keys=keys, inference='masked')
    packed = adapted(kind, 'dyt', rate, dispatch=dispatch, keys=keys, inference='packed')
    packed.load_state_dict(masked.state_dict())
    with record_dispatch(packed) as record:
        found = packed(images())
    assert 0.1 < activation_rate(record.flat()) < 0.9
    close(found, masked(images()))


@pytest.mark.parametrize('kind', VITS)
@pytest.mark.parametrize('rate', [0.25, 0.5, 1.0])
@torch.no_grad()
def test_the_rate_is_met_in_every_image(kind, rate):
    model = adapted(kind, 'dyt', rate, dispatch='attn_mlp')
    with record_dispatch(model) as record:
        model(images(3))
    assert len(record.names) == 6
    for dispatch in record.flat():
        assert dispatch.patch_mask.mean(dim=1).flatten().tolist() == [rate] * 3


@pytest.mark.parametrize('kind', VITS)
@pytest.mark.parametrize('method', ['lora', 'ssf', 'ether'])
@torch.no_grad()
def test_merged_equals_unmerged(kind, method):
    model = adapted(kind, method)
    before, shapes = model(images()), {name: p.shape for name, p in VITS[kind]().named_parameters()}
    assert model.merge() == []
    assert {name: p.shape for name, p in model.vit.named_parameters()} == shapes
    close(model(images()), before)


@pytest.mark.parametrize('kind', VITS)
def test_evidence_is_fitted_and_shares_the_rate(kind):
    torch.manual_seed(0)
    model = mmdyt.adapt(scrambled(VITS[kind]()), 'evidence', rate=0.5)
    batches = [images(4, seed=seed) for seed in range(3)]
    with torch.no_grad(), complete_model(model):
        complete = model(batches[0])
    assert model.waits
    with torch.no_grad():
        close(model(batches[0]), complete)  # gates that are not fitted choose nothing
    explained = model.fit(iter(batches), loss_of)
    *some, last = explained.values()
    assert len(some) == 2 and all(0.05 < share <= 1 for share in some)
    assert abs(last) < 1e-6  # behind it the class token alone is read: patches have no evidence
    for rate in (0.5, 0.25):
        model.set_rate(rate)
        with torch.no_grad(), record_dispatch(model) as record:
            model(images(2, seed=7))
        shares = [dispatch.patch_mask.mean().item() for dispatch in record.flat()]
        assert len(set(shares)) > 1  # where evidence is
        assert sum(shares) / 3 == pytest.approx(rate, abs=0.5 / 16)  # to the nearest token of each branch
    assert all(part.value.abs().max() > 0 for part in parts(model) if part.word == 'substitute')


@pytest.mark.parametrize('method', ['lora', 'tome'])
def test_what_has_no_gates_is_not_fitted(method):
    with pytest.raises(ValueError, match='dispatcher'):
        adapted('timm', method).fit([images()], loss_of)


def test_gates_that_keep_tokens_are_fitted():
    model = mmdyt.adapt(scrambled(TimmViT()), 'sparse_evidence', at=[1])
    assert len(model.fit([images(4)], loss_of)) == 1


@pytest.mark.parametrize('kind', VITS)
@pytest.mark.parametrize('method', ['dyt', 'evidence', 'lora', 'vpt_deep', 'sparse_tuning', 'ssf'])
def test_only_parts_and_the_classifier_are_trained(kind, method):
    vit = scrambled(VITS[kind]())
    base = {name for name, _ in vit.named_parameters() if 'head' not in name and 'classifier' not in name}
    model = stirred(mmdyt.adapt(vit, method)).train()
    loss_of(model, images()).backward()
    with_gradient = {name for name, p in vit.named_parameters() if p.grad is not None}
    assert not with_gradient & base
    assert {name for name, p in vit.named_parameters() if p.requires_grad} == with_gradient
    assert any('dynamic' in name for name in with_gradient) and any(name.endswith('r.weight') or 'head' in name
                                                                    for name in with_gradient)  # fmt: skip


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('kind', ['timm', 'hf'])
def test_checkpointed_gradients_are_the_same(kind, method):
    found = []
    for with_cp in (False, True):
        model = adapted(kind, method, with_cp=with_cp).train()
        assert all(module.with_cp == with_cp for module in model.modules() if hasattr(module, 'with_cp'))
        torch.manual_seed(0)
        loss_of(model, images()).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[1], found[0])


def test_the_rate_loss_reaches_the_gates():
    model = adapted('timm', 'dyt', tuned=['dispatcher']).train()
    with record_dispatch(model) as record:
        model(images())
    rate_loss(activation_rate(record.flat()), 0.1).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize('method', ['dyt', 'context', 'tome', 'sparse_tuning', 'vpt_deep', 'lora', 'adapter_plus'])
@pytest.mark.parametrize('kind', VITS)
@torch.no_grad()
def test_costs_are_those_of_an_operator_counter(kind, method):
    vit, x = scrambled(VITS[kind]()), images()
    plain = count_macs(lambda: vit(x)) / 2
    model = stirred(mmdyt.adapt(vit, method))
    if method in ('dyt', 'context'):
        for part in parts(model):
            if part.word == 'dispatcher':
                part.set_rule(capacity=0.5)
    assert model.plain_macs(x) == plain
    found = torch.as_tensor(model.macs(x)).expand(2)
    assert found.tolist() == [count_macs(lambda: model(x)) / 2] * 2


@pytest.mark.parametrize('method', ['vpt_deep', 'tome', 'sparse_tuning'])
@torch.no_grad()
def test_features_are_laid_out_as_the_library_has_them(method):
    model = adapted('timm', method)
    assert model.vit.forward_features(images()).shape == (2, 17, 16)


@torch.no_grad()
def test_networks_and_threads_do_not_hear_of_each_other():
    models = [adapted('timm', 'vpt_shallow', length=3), adapted('hf', 'tome', r=2)]
    models.append(copy.deepcopy(models[0]))
    expected, found = [model(images()) for model in models], {}

    def run(index):
        with torch.no_grad():
            found[index] = [models[index](images()) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(3):
        assert all(torch.equal(one, expected[i]) for one in found[i])


@torch.no_grad()
def test_a_pickled_network_is_the_same():
    for kind in VITS:
        model = adapted(kind, 'dyt', 0.5)
        assert torch.equal(pickle.loads(pickle.dumps(model))(images()), model(images()))


@pytest.mark.parametrize('kind', VITS)
@torch.no_grad()
def test_halves_and_small_layer_scales_are_adapted(kind):
    vit = scrambled(VITS[kind]()).bfloat16()
    for name, parameter in vit.named_parameters():
        if 'gamma' in name:
            parameter.fill_(1e-5)
    model = mmdyt.adapt(vit, 'dyt', rate=0.5)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(images().bfloat16()).isfinite().all()


class SmallStrange(TimmBlock):
    """Another function, told by its small update alone."""

    def forward(self, x):
        return x + 1e-5 * self.attn(x)


@pytest.mark.parametrize('kind', VITS)
@torch.no_grad()
def test_it_is_one_graph_and_can_be_exported(kind):
    model = adapted(kind, 'dyt', 0.5)
    explained = torch._dynamo.explain(model)(images())
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    exported = torch.export.export(model, (images(),), strict=False).module()
    assert torch.equal(exported(images(seed=4)), model(images(seed=4)))


@pytest.mark.parametrize(('kind', 'where'), [('timm', 'blocks.1.attn.attn_drop'),
                                             ('hf', 'vit.encoder.layer.1.attention.attention.dropout')])  # fmt: skip
def test_dropout_of_attention_goes_on(kind, where):
    vit = scrambled(VITS[kind]())
    vit.get_submodule(where).p = 0.3
    model = mmdyt.adapt(vit, 'adapter')
    assert [block.attn_drop for block in model.modules() if hasattr(block, 'attn_drop')
            and hasattr(block, 'place')] == [0.0, 0.3, 0.0]  # fmt: skip


@torch.no_grad()
def test_parts_are_given_as_configs_and_classes_too():
    by_word = adapted('hf', 'lora', rank=2)
    by_config = adapted('hf', [dict(type='mmdyt.LoRA', on='attn.qkv', rows='qv', rank=2, layers=[0, 1, 2])])
    by_class = adapted('hf', [LoRA], rank=2)
    assert torch.equal(by_word(images()), by_config(images()))
    assert torch.equal(by_word(images()), by_class(images()))


@torch.no_grad()
def test_separate_linears_are_rewritten_as_rows_of_one_are():
    model = adapted('hf', [dict(type='LoRA', on='linears', rank=2)])
    names = {name.split('.dynamic.')[1].rsplit('.', 1)[0] for name, _ in model.named_parameters() if 'lora' in name}
    assert names == {f'attn.lora.{name}' for name in ('q', 'k', 'v', 'proj')} | {'mlp.lora.fc1', 'mlp.lora.fc2'}


def test_nothing_skipped_is_said():
    model = adapted('timm', 'dyt')
    with pytest.warns(NothingSkippedWarning, match='no_grad'):
        model(images())


class Strange(TimmBlock):
    """The same modules, in another order."""

    def forward(self, x):
        return self.norm2(x + self.mlp(self.attn(self.norm1(x))))


class More(TimmBlock):
    """Something beside."""

    def __init__(self):
        super().__init__()
        self.attn.q_norm = torch.nn.LayerNorm(4)


class Less(TimmBlock):
    """Without a module."""

    def __init__(self):
        super().__init__()
        self.attn.proj = None


REFUSED = {
    'no network': (lambda: 'vit', {}, "vit must be a network, got a str"),
    'no transformer': (lambda: torch.nn.Linear(2, 2), {}, 'vit must be a Vision Transformer of timm .* got a Linear'),
    'another order': (lambda: TimmViT(Strange), {}, 'got a Strange with modules like these, which computes something'),
    'another small update': (
        lambda: TimmViT(SmallStrange), {}, 'got a SmallStrange with modules like these'
    ),
    'something beside': (lambda: TimmViT(More), {}, 'got attn.q_norm.weight in one'),
    'something less': (lambda: TimmViT(Less), {}, 'got a Less without attn.proj'),
    'unknown word': (TimmViT, dict(method='dytt'), "method must be one of .*'lora'.*, got 'dytt'"),
    'no parts': (TimmViT, dict(method=3), 'method must be a word or a list of parts, got 3'),
    'unknown part': (TimmViT, dict(method=[dict(type='LoRa')]), "type must be one of .*, got 'LoRa'"),
    'unknown option': (TimmViT, dict(method='lora', rang=4), "options must be .*'rank'.*, got 'rang'"),
    'rate of nothing': (TimmViT, dict(method='lora', rate=0.5), 'rate must be None with a method that has no disp'),
    'percent': (TimmViT, dict(rate=50), 'target_rate must lie in'),
    'rows of one': (HFViT, dict(method=[dict(type='LoRA', on='attn.qkv')]), "on must name some of .*'attn.q'"),
    'keys': (TimmViT, dict(keys='all'), "keys must be 'active' with dispatch='mlp'"),
    'grid': (TimmViT, dict(method=['CellDispatcher']), 'method must hold configs'),
    'cells': (TimmViT, dict(method=[dict(type='CellDispatcher')]), 'which decides by the grid'),
    'pattern': (TimmViT, dict(tuned=['nothing']), 'tuned must hold patterns that match'),
}  # fmt: skip


@pytest.mark.parametrize(('build', 'options', 'said'), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_named_and_as_it_was(build, options, said):
    vit = build()
    modules = list(vit.modules()) if isinstance(vit, torch.nn.Module) else []
    with pytest.raises(ValueError, match=said):
        mmdyt.adapt(vit, **options)
    if modules:
        assert [*vit.modules()] == modules and all(p.requires_grad for p in vit.parameters())


def test_an_adapted_network_is_not_adapted_again():
    with pytest.raises(ValueError, match='adapted already'):
        mmdyt.adapt(adapted('timm').vit, 'lora')


def test_masks_and_layers_on_their_own_are_refused():
    layers = adapted('timm').vit.blocks
    with pytest.raises(ValueError, match='attention_mask must not be given'):
        layers[0](torch.zeros(1, 5, 16), torch.zeros(1, 5))
    with pytest.raises(ValueError, match='checkpointing must be off'):
        layers[1](torch.zeros(1, 5, 16))
