import pytest
import torch
import torch.nn as nn

from mmdyt.core.tokens import TokenState
from mmdyt.parts.adapter import Adapter
from mmdyt.parts.moe_adapter import MoEAdapter


def make(dim=6, **arguments):
    torch.manual_seed(0)
    adapter = MoEAdapter(dim, **(dict(bottleneck=3, num_experts=4, dropout=0.0) | arguments)).double()
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return adapter


def tokens(batch=5, dim=6):
    return torch.randn(batch, 7, dim, dtype=torch.float64)


def test_fresh_moe_adapter_is_the_zero_map_with_a_gradient():
    adapter, x = MoEAdapter(6, num_experts=3), torch.randn(2, 4, 6)
    out = adapter(x)
    assert torch.equal(out, torch.zeros_like(out))
    out.sum().backward()
    assert adapter.up_weight.grad.abs().sum() > 0


@pytest.mark.parametrize('activation', ['softmax', 'sigmoid', 'none'])
def test_it_equals_a_loop_over_images_written_from_equation_7(activation):
    adapter, x = make(router_activation=activation, scale=0.5), tokens()
    expected = []
    for image in x:
        z = adapter.router(image.mean(0))
        a = dict(softmax=z.softmax(0), sigmoid=z.sigmoid(), none=z)[activation]
        down = sum(a[i] * adapter.down_weight[i] for i in range(4))
        up = sum(a[i] * adapter.up_weight[i] for i in range(4))
        down_bias = sum(a[i] * adapter.down_bias[i] for i in range(4))
        up_bias = sum(a[i] * adapter.up_bias[i] for i in range(4))
        expected.append(0.5 * (torch.relu(image @ down.T + down_bias) @ up.T + up_bias))
    torch.testing.assert_close(adapter(x), torch.stack(expected))


def test_one_expert_of_router_weight_one_is_a_plain_adapter():
    moe, plain = make(num_experts=1), Adapter(6, 3, dropout=0.0).double()  # softmax over one expert is 1
    with torch.no_grad():
        plain.down.weight.copy_(moe.down_weight[0])
        plain.down.bias.copy_(moe.down_bias[0])
        plain.up.weight.copy_(moe.up_weight[0])
        plain.up.bias.copy_(moe.up_bias[0])
    x = tokens()
    torch.testing.assert_close(moe(x), plain(x))


def test_each_image_gets_its_own_mixture_whatever_its_batch():
    adapter, x = make(), tokens()
    weights = adapter.expert_weights(x)
    assert weights.shape == (5, 4)
    torch.testing.assert_close(weights.sum(1), torch.ones(5, dtype=torch.float64))
    assert (weights[0] - weights[1]).abs().max() > 1e-3
    for i in range(5):
        torch.testing.assert_close(adapter(x[i : i + 1])[0], adapter(x)[i])


def test_per_clip_routing_shares_a_mixture_among_the_frames_of_a_clip():
    adapter, x, state = make(routing='clip'), tokens(batch=6), TokenState(frames=2)
    weights = adapter.expert_weights(x, state)
    assert torch.equal(weights[0::2], weights[1::2])
    assert not torch.equal(weights[0], weights[2])
    both = x.unflatten(0, (3, 2)).flatten(1, 2)  # a clip as one long image
    torch.testing.assert_close(weights[0::2], make().expert_weights(both))
    a, down, up = weights, adapter.down_weight, adapter.up_weight
    for i in range(6):  # each frame by the adapter of its clip
        mixed = [torch.einsum('e,e...->...', a[i], w) for w in (down, adapter.down_bias, up, adapter.up_bias)]
        expected = 0.1 * (torch.relu(x[i] @ mixed[0].T + mixed[1]) @ mixed[2].T + mixed[3])
        torch.testing.assert_close(adapter(x, state)[i], expected)


def test_frames_are_on_their_own_in_images_and_by_default():
    x = tokens(batch=6)
    alone = make().expert_weights(x)
    assert torch.equal(make().expert_weights(x, TokenState(frames=2)), alone)
    assert torch.equal(make(routing='clip').expert_weights(x, TokenState(frames=1)), alone)
    assert torch.equal(make(routing='clip').expert_weights(x), alone)


def test_mixing_outputs_is_another_function():
    x = tokens()
    weights, outputs = make(mix='weights'), make(mix='outputs')
    a = outputs.expert_weights(x)
    expected = 0
    for i in range(4):
        hidden = torch.relu(x @ outputs.down_weight[i].T + outputs.down_bias[i])
        expected = expected + a[:, i, None, None] * 0.1 * (hidden @ outputs.up_weight[i].T + outputs.up_bias[i])
    torch.testing.assert_close(outputs(x), expected)
    assert (weights(x) - outputs(x)).abs().max() > 1e-3


def test_four_experts_of_vit_b_have_the_papers_parameters():
    with torch.device('meta'):
        count = 12 * sum(p.numel() for p in MoEAdapter(768, 64, 4).parameters())
    assert count == 12 * (4 * (2 * 768 * 64 + 64 + 768) + 4 * 769)
    assert round(count / 1e6, 2) == 4.80  # arXiv 2403.11808


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(num_experts=0), 'num_experts must be a positive integer, got 0'),
        (dict(routing='video'), r"routing must be one of \['frame', 'clip'\], got 'video'"),
        (dict(router_activation='relu'), "router_activation must be one of .* got 'relu'"),
        (dict(mix='logits'), r"mix must be one of \['weights', 'outputs'\], got 'logits'"),
        (dict(bottleneck=0), 'bottleneck must be a positive integer, got 0'),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MoEAdapter(8, **arguments)
