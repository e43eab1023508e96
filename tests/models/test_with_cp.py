"""Gradient checkpointing: the same losses and gradients, for less memory, in every recipe."""

import gc
import weakref

import pytest
import torch
from test_methods import METHODS, build, images, learn
from test_methods_in_hosts import DECIDING, WITH_DISPATCH
from test_methods_in_hosts import build as build_host  # noqa: F401  a fixture

from mmdyt.core.fit.evidence import fit_dispatchers
from mmdyt.core.observe import all_branches, complete_model, dynamic_branches, record_dispatch
from mmdyt.core.teacher import FeatureTeacher


def recompute(model, with_cp=True):
    for module in model.modules():
        if hasattr(module, 'with_cp'):
            module.with_cp = with_cp
    return model


def gradients(model, loss):
    """Of a loss of the model, by name."""
    torch.manual_seed(3)
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, loss):
    plain = gradients(recompute(model, False), loss)
    again = gradients(recompute(model), loss)
    assert plain and plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-6, atol=1e-6 * gradient.abs().max().item(), msg=name)


@pytest.mark.parametrize('host', ['classification', 'segmentation', 'video'])
@pytest.mark.parametrize('method', sorted({*METHODS, *WITH_DISPATCH}))
def test_every_recipe_has_the_same_losses_and_gradients(build_host, host, method):  # noqa: F811
    model, (inputs, samples) = build_host(host, method)
    model.train()
    if 'full' not in method and host == 'classification':
        model.teacher = FeatureTeacher(model.backbone, 1.0)
    found = []

    def loss(model):
        found.append(model.loss(inputs, samples))
        return model.parse_losses(found[-1])[0]

    assert_same(model, loss)
    torch.testing.assert_close(found[1], found[0])
    assert not dynamic_branches(model) or 'loss_rate' in found[0]


VARIANTS = [
    *[dict(dispatch=d, keys=k) for d in ('attn', 'attn_mlp', 'layer') for k in ('active', 'all')],
    *[dict(training=training) for training in ('masked', 'split', 'masked_all_keys')],
    dict(drop_path_rate=0.3),
    dict(drop_rate=0.2),
    dict(skip_unread=True, out_type='cls_token'),
    dict(num_registers=2),
    dict(decide_per='level', out_indices=(1, 3), out_type='featmap'),
    dict(dispatcher=dict(type='mmdyt.CellDispatcher', cell=(2, 2))),
    dict(dispatcher=dict(type='mmdyt.SampleDispatcher')),
    dict(adapter=dict(type='mmdyt.MoEAdapter', num_experts=2, bottleneck=4)),
    dict(parts=[dict(type='mmdyt.LoRA', on='attn.qkv', rows='qv'), dict(type='mmdyt.SparseTokens', layers=[1])]),
]


@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_every_variant_has_the_same_gradients_of_features_and_masks(variant):
    model = learn(build('dyt', **variant)).train()

    def loss(model):
        with record_dispatch(model) as record:
            features = model(images())
        masks = [dispatch.mask.mean() for dispatch in record.flat() if dispatch.mask.requires_grad]
        assert masks and all(len(runs) == 1 for runs in record.runs.values())
        return sum(level.square().mean() for level in features) + sum(masks)

    assert_same(model, loss)


def test_a_pass_of_the_complete_model_is_run_again_as_the_complete_model():
    model = learn(build('dyt')).train()

    def loss(model):
        with complete_model(model), record_dispatch(model) as record:
            value = model(images())[-1].square().mean()
        assert all(dispatch.complete for dispatch in record.flat())
        return value  # whose gradient is asked for outside

    assert_same(model, loss)
    with record_dispatch(model) as record:
        loss(recompute(model)).backward()
    assert {len(passes) for passes in record.runs.values()} == {1}


def test_saliency_maps_in_inference_and_a_graph_that_is_kept():
    model = recompute(learn(build('dyt')))
    x = images().requires_grad_()
    value = model(x)[-1].square().mean()
    first, second = (torch.autograd.grad(value, x, retain_graph=True)[0] for _ in range(2))
    plain = torch.autograd.grad(recompute(model, False)(x)[-1].square().mean(), x)[0]
    torch.testing.assert_close(first, plain)
    torch.testing.assert_close(second, plain)


def test_evidence_is_the_same():
    gates = []
    for with_cp in (False, True):
        model = recompute(learn(build('evidence')), with_cp)
        fit_dispatchers(model, [lambda model=model: model(images())[-1].square().mean()])
        gates.append([branch.dispatcher.gate.weight.detach() for branch in dynamic_branches(model).values()])
    torch.testing.assert_close(gates[1], gates[0])


def saved_bytes(model):
    """What the graph of a pass holds, but for parameters."""
    own, total = {p.data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            total[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = model(images(8))[-1].square().mean()
    value.backward()
    return sum(total.values())


@pytest.mark.parametrize('method', [m for m in METHODS if m not in ('linear', 'tome', 'tocom')])  # which tune nothing
def test_little_is_held_for_the_backward_pass(method):
    model = learn(build(method)).train()
    assert saved_bytes(recompute(model)) < 0.3 * saved_bytes(recompute(model, False))


def test_a_pass_without_a_backward_pass_leaves_nothing_behind():
    model = recompute(learn(build('sparse_tuning'))).train()
    seen = []
    branch = next(iter(all_branches(model).values()))
    handle = branch.register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out)))
    model(images())
    handle.remove()
    gc.collect()
    assert seen and seen[0]() is None


def test_without_gradients_nothing_is_prepared():
    model = recompute(learn(build('dyt')))
    with torch.no_grad():
        torch.testing.assert_close(model(images()), recompute(model, False)(images()))


@pytest.mark.parametrize('value', ['yes', 1, None])
def test_a_switch_is_a_switch(value):
    with pytest.raises(ValueError, match='with_cp must be True or False'):
        build('dyt', with_cp=value)


def test_the_backbone_hands_it_to_its_layers():
    assert DECIDING and all(layer.with_cp for layer in build('dyt', with_cp=True).layers)


def test_layers_stay_out_of_a_compiled_model():
    model = learn(build('dyt', with_cp=True)).train()

    def loss(run):
        return run(images())[-1].square().mean()

    plain = gradients(model, loss)
    torch.manual_seed(3)
    model.zero_grad()
    loss(torch.compile(model, backend='eager')).backward()
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, plain)
