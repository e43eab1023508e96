"""What inactive tokens get instead of the branch, in a whole Vision Transformer."""

import pytest
import torch
import torch.nn as nn

from mmdyt.core.fit.mean_update import fit_mean_updates
from mmdyt.core.observe import complete_model, dynamic_branches, watch_updates
from mmdyt.models import DyTVisionTransformer

DIM = 8


def make_vit(**arguments) -> DyTVisionTransformer:
    torch.manual_seed(0)
    arch = dict(embed_dims=DIM, num_layers=3, num_heads=2, feedforward_channels=16)
    options = dict(out_type='raw', substitute=dict(type='mmdyt.MeanUpdate')) | arguments
    model = DyTVisionTransformer(arch, img_size=64, **options)
    model.init_weights()
    for branch in dynamic_branches(model).values():
        nn.init.normal_(branch.adapter.up.weight)
        nn.init.normal_(branch.dispatcher.gate.weight)
    return model.eval()


def images(number: int = 3) -> torch.Tensor:
    return torch.randn(number, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('dispatch', ['mlp', 'attn', 'attn_mlp', 'layer'])
def test_the_fit_is_the_mean_update_of_patch_tokens(dispatch):
    model = make_vit(dispatch=dispatch)
    updates = {}

    def keep(name, update):
        updates.setdefault(name, []).append(update[:, 1:])

    batches = [images(3), images(2) + 1]
    with torch.no_grad(), complete_model(model), watch_updates(model, keep):
        for batch in batches:
            model(batch)
    fitted = fit_mean_updates(model, [lambda batch=batch: model(batch) for batch in batches])
    assert fitted == list(updates) == list(dynamic_branches(model))
    for name, branch in dynamic_branches(model).items():
        expected = torch.cat(updates[name]).flatten(0, 1).mean(0)
        torch.testing.assert_close(branch.substitute.value.detach(), expected, atol=1e-6, rtol=1e-5)


def test_the_fit_is_of_all_tokens_whatever_mode_and_masks():
    model = make_vit()
    fit_mean_updates(model, [lambda: model(images())])
    first = {name: branch.substitute.value.clone() for name, branch in dynamic_branches(model).items()}
    model.train()
    for branch in dynamic_branches(model).values():
        branch.dispatcher.set_rule(torch.inf)
    fit_mean_updates(model, [lambda: model(images())])
    assert model.training
    for name, branch in dynamic_branches(model).items():
        assert torch.equal(branch.substitute.value, first[name])


def test_a_last_layer_that_reads_the_class_token_only_is_left_out():
    model = make_vit(skip_unread=True, out_type='cls_token')
    fitted = fit_mean_updates(model, [lambda: model(images())])
    assert fitted == list(dynamic_branches(model))[:-1]
    assert not dynamic_branches(model)['layers.2.dynamic.mlp'].substitute.value.any()


def test_models_without_one_are_left_alone():
    model = make_vit(substitute=None)
    assert fit_mean_updates(model, [lambda: pytest.fail('ran for nothing')]) == []


@pytest.mark.parametrize('dispatch', ['mlp', 'attn', 'attn_mlp', 'layer'])
def test_packed_equals_masked(dispatch):
    packed, masked = (make_vit(dispatch=dispatch, inference=executor) for executor in ('packed', 'masked'))
    fit_mean_updates(packed, [lambda: packed(images())])
    masked.load_state_dict(packed.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(packed(images())[0], masked(images())[0], atol=1e-6, rtol=1e-5)


def test_the_complete_model_is_not_affected():
    model = make_vit()
    with torch.no_grad(), complete_model(model):
        before = model(images())[0]
        fit_mean_updates(model, [lambda: model(images())])
        assert torch.equal(model(images())[0], before)


def test_is_named_tuned_and_saved():
    model = make_vit()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sum(name.endswith('.dynamic.mlp.substitute.value') for name in names) == 3
    model = make_vit(tuned=['adapter'])
    assert not any('substitute' in name for name, p in model.named_parameters() if p.requires_grad)


def test_watchers_see_nothing_afterwards_even_after_an_error():
    model, seen = make_vit(), []
    with pytest.raises(RuntimeError), complete_model(model), watch_updates(model, lambda *args: seen.append(args)):
        raise RuntimeError
    with complete_model(model):
        model(images())
    assert not seen


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match='substitute must be None without a dispatcher'):
        make_vit(dispatcher=None)
    with pytest.raises(ValueError, match="substitute must be a config or None, got 'mean'."):
        DyTVisionTransformer('deit-tiny', substitute='mean')
