"""A teacher is the complete model of an earlier moment, and leaves the model that it teaches alone."""

import copy

import pytest
import torch
import torch.nn as nn

from mmdyt.core.levels import level_masks
from mmdyt.core.observe import complete_model, dynamic_branches, record_dispatch
from mmdyt.core.teacher import FeatureTeacher
from mmdyt.models import DyTVisionTransformer

ARCH = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64)


def build(**vit) -> DyTVisionTransformer:
    torch.manual_seed(0)
    model = DyTVisionTransformer(ARCH, img_size=64, out_indices=(1, 2), **vit).train()
    for branch in dynamic_branches(model).values():
        nn.init.normal_(branch.adapter.up.weight)
        nn.init.normal_(branch.dispatcher.gate.weight)
    return model


def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_features_are_the_complete_models_of_that_moment_without_dropout():
    model = build()
    with torch.no_grad(), complete_model(model.eval()):
        expected = model(images())
    teacher = FeatureTeacher(model.train(), 1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    found = teacher.features(model, images())
    assert len(found) == 2
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e) and not f.requires_grad
    assert model.training and not any(branch.complete for branch in dynamic_branches(model).values())


def test_keeps_tuned_parameters_only():
    model = build()
    tensors = FeatureTeacher(model, 1.0).tensors
    assert list(tensors) == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert 0 < sum(t.numel() for t in tensors.values()) < sum(p.numel() for p in model.parameters())


def test_a_teacher_goes_on_from_its_tensors():
    model = build()
    teacher = FeatureTeacher(model, 1.0)
    with torch.no_grad():
        dynamic_branches(model)['layers.0.dynamic.mlp'].adapter.up.weight.mul_(2)
    again = FeatureTeacher(model, 1.0, copy.deepcopy(teacher.tensors))
    for found, expected in zip(again.features(model, images()), teacher.features(model, images()), strict=True):
        assert torch.equal(found, expected)


def test_the_gradient_reaches_the_model_and_not_the_teacher():
    model = build()
    teacher = FeatureTeacher(model, 3.0)
    teacher.loss(model, (images(),), model(images())).backward()
    assert dynamic_branches(model)['layers.0.dynamic.mlp'].adapter.up.weight.grad.any()
    assert not any(tensor.requires_grad for tensor in teacher.tensors.values())


def test_cells_that_skipped_count_more_by_the_share_of_the_branches_that_they_skipped():
    model = build(out_type='featmap')
    plain, weighing = FeatureTeacher(model, 3.0), FeatureTeacher(model, 3.0, inactive_weight=2.0)
    with record_dispatch(model) as record:
        features = model(images())
    masks = level_masks(record.of_pass(), model.out_indices, features[0])
    expected = []
    for level, (student, teacher) in enumerate(zip(features, plain.features(model, images()), strict=True)):
        dispatches = list(record.of_pass().values())[:2] if level == 0 else list(record.of_pass().values())[2:]
        inactive = 1 - torch.stack([d.patch_mask for d in dispatches]).mean(0).view(2, 1, 4, 4)
        weights = (1 + 2 * inactive) / (1 + 2 * inactive.mean())
        assert 0 < inactive.mean() < 1
        expected.append((weights * (student - teacher) ** 2).sum() / (teacher**2).sum())
    found = weighing.loss(model, (images(),), features, masks)
    torch.testing.assert_close(found, 3.0 * sum(expected) / 2)
    assert not torch.allclose(found, plain.loss(model, (images(),), features), rtol=1e-3)


def test_weights_have_no_gradient():
    model = build(out_type='featmap')
    mask = torch.rand(2, 1, 4, 4, requires_grad=True)
    features = [feature.detach() for feature in model(images())]
    loss = FeatureTeacher(model, 1.0, inactive_weight=1.0).loss(model, (images(),), features, [mask, mask])
    assert not loss.requires_grad


def test_tensors_of_another_model_are_refused():
    with pytest.raises(ValueError, match='tensors must be the .* tuned parameters of the backbone, got 1'):
        FeatureTeacher(build(), 1.0, dict(a=torch.ones(1)))
