"""A traced or exported model computes for every image what the model does, or is refused."""

import io

import pytest
import torch
from doubles import Fixed, Gate, PlainLayer, Update
from static_graphs import export_any_batch, not_static

from mmdyt.core.dispatch import best_tokens

VARIANTS = [('mlp', 'active'), *((d, keys) for d in ('attn', 'attn_mlp', 'layer') for keys in ('active', 'all'))]
CAPACITY = dict(none=0.0, some=0.5, all=1.0)
IMAGES = torch.randn(2, 2, 9, 16, generator=torch.Generator().manual_seed(1))


class BestGate(Gate):
    """Takes as many tokens of each image as its capacity says."""

    capacity = 0.5

    def forward(self, x, state=None):
        return best_tokens(self._score(x, state), self.capacity, self._prefix(state))


def build(dispatch, inference, keys='active', gate=Gate):
    torch.manual_seed(0)
    layer = PlainLayer(dispatch=dispatch, inference=inference, keys=keys)
    for site in layer.sites:
        layer.branch(site).add(Update(16))
        layer.branch(site).add(gate(16))
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


@pytest.mark.parametrize('capacity', CAPACITY)
@pytest.mark.parametrize(('dispatch', 'keys'), VARIANTS)
def test_fixed_is_exported_statically_for_any_number_of_images(dispatch, keys, capacity):
    layer = build(dispatch, 'fixed', keys, BestGate)
    for site in layer.sites:
        layer.branch(site).dispatcher.capacity = CAPACITY[capacity]
    with torch.no_grad():
        program = export_any_batch(layer, IMAGES[0])
        assert not_static(program) == []
        run = program.module()
        for images in (IMAGES[1], IMAGES[1, :1], torch.randn(5, 9, 16)):
            torch.testing.assert_close(run(images), layer(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize(('dispatch', 'keys'), VARIANTS)
def test_fixed_is_compiled_as_one_graph(dispatch, keys):
    layer = build(dispatch, 'fixed', keys, BestGate)
    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True, backend='eager')
    with torch.no_grad():
        for images in (IMAGES[0], IMAGES[1], IMAGES[1, :1], torch.randn(5, 9, 16)):
            torch.testing.assert_close(run(images), layer(images), rtol=0, atol=1e-6)


def test_what_is_not_static_is_seen():
    class Waits(torch.nn.Module):
        def forward(self, x):
            return x.flatten(0, 1).index_select(0, (x[..., 0] > 0).flatten().nonzero().squeeze(1))

    found = not_static(export_any_batch(Waits(), IMAGES[0]))
    assert any('nonzero' in name for name in found) and any('shape' in name for name in found)
