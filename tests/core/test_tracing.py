"""A traced or exported model computes for every image what the model does, or is refused."""

import io

import pytest
import torch
from doubles import Fixed, Gate, PlainLayer, Update

IMAGES = torch.randn(2, 2, 9, 16, generator=torch.Generator().manual_seed(1))


def build(dispatch, inference):
    torch.manual_seed(0)
    layer = PlainLayer(dispatch=dispatch, inference=inference)
    for site in layer.sites:
        layer.branch(site).add(Update(16))
        layer.branch(site).add(Gate(16))
    return layer.eval()


def traced(layer, example):
    return torch.jit.trace(layer, example, check_trace=False)


def exported(layer, example):
    return torch.export.export(layer, (example,)).module()


def to_onnx(layer, example):
    torch.onnx.export(layer, (example,), io.BytesIO(), dynamo=False)


@pytest.mark.filterwarnings('ignore')  # of tracing
@pytest.mark.parametrize('make', [traced, exported])
@pytest.mark.parametrize('dispatch', ['mlp', 'attn', 'attn_mlp', 'layer'])
def test_masked_gives_what_the_model_gives_for_another_image(make, dispatch):
    layer = build(dispatch, 'masked')
    with torch.no_grad():
        torch.testing.assert_close(make(layer, IMAGES[0])(IMAGES[1]), layer(IMAGES[1]))


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('make', [traced, exported, to_onnx])
@pytest.mark.parametrize('dispatch', ['mlp', 'attn', 'attn_mlp', 'layer'])
def test_packed_attention_is_refused_and_so_is_all_that_is_packed_by_export(make, dispatch):
    layer = build(dispatch, 'packed')
    if dispatch == 'mlp' and make is not exported:
        pytest.skip('an MLP does not look at the numbers of active tokens')
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="^inference must be 'fixed' or 'masked' to trace or export a model"),
    ):
        make(layer, IMAGES[0])
    with torch.no_grad():
        layer(IMAGES[0])


@pytest.mark.filterwarnings('ignore')
def test_a_packed_mlp_is_traced_unless_the_example_has_no_active_token():
    layer = build('mlp', 'packed')
    idle = PlainLayer()
    idle.branch('mlp').add(Fixed(torch.zeros(2, 9, 1)))
    with torch.no_grad():
        torch.testing.assert_close(traced(layer, IMAGES[0])(IMAGES[1]), layer(IMAGES[1]))
        with pytest.raises(RuntimeError, match="^inference must be 'fixed' or 'masked' to trace"):
            traced(idle.eval(), IMAGES[0])
