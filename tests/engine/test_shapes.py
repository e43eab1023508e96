import pytest
import torch
from mmengine.registry import MODELS

import mmdyt.models.segmentor  # noqa: F401  hosts cannot be imported on the meta device
from mmdyt.engine.shapes import shapes_only

HEAD = dict(type='mmseg.SegmenterMaskTransformerHead', in_channels=8, channels=8, embed_dims=8, num_heads=2,
            num_classes=3, num_layers=2, drop_path_rate=0.2)  # fmt: skip


def test_heads_that_read_a_schedule_are_built_without_values():
    with torch.device('meta'), pytest.raises(RuntimeError, match='item'):
        MODELS.build(HEAD)  # what the context is for
    with shapes_only():
        head = MODELS.build(HEAD)
    assert all(parameter.is_meta for parameter in head.parameters())
    assert head.layers[1].ffn.dropout_layer.drop_prob == pytest.approx(0.2)


def test_only_schedules_have_values_and_only_within():
    with shapes_only():
        assert torch.linspace(0, 1, 3).tolist() == [0, 0.5, 1]
        assert torch.linspace(0, 1, 3, device='meta').is_meta and torch.zeros(2).is_meta
        assert torch.nn.Linear(2, 2).weight.is_meta
    assert not torch.zeros(2).is_meta
