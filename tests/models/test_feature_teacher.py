"""A teacher is the complete model of an earlier moment, and leaves the model that it teaches alone."""

import copy

import pytest
import torch
import torch.nn as nn

from mmdyt.core.observe import complete_model, dynamic_branches
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


def test_tensors_of_another_model_are_refused():
    with pytest.raises(ValueError, match='tensors must be the .* tuned parameters of the backbone, got 1'):
        FeatureTeacher(build(), 1.0, dict(a=torch.ones(1)))
