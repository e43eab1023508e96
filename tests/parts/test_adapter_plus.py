import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from doubles import MLP, Fixed

from mmdyt.core.branch import DynamicBranch
from mmdyt.parts.adapter_plus import AdapterPlus


def learnt(dim=16, **options):
    part = AdapterPlus(dim, bottleneck=4, **options)
    for parameter in part.parameters():
        nn.init.normal_(parameter)
    return part


@torch.no_grad()
def test_it_reads_what_the_branch_left_and_adds_to_every_token():
    mask = torch.ones(2, 7, 1)
    mask[:, 3:] = 0
    part, mlp, x = learnt(), MLP(16), torch.randn(2, 7, 16)
    z = x + mask * mlp(x)
    expected = z + part.scale * (F.gelu(z @ part.down.weight.T + part.down.bias) @ part.up.weight.T + part.up.bias)
    for executor in ('packed', 'masked'):
        branch = DynamicBranch(part, Fixed(mask), inference=executor).eval()
        torch.testing.assert_close(branch(x, mlp), expected)


@torch.no_grad()
def test_a_scale_of_zero_is_the_plain_branch():
    part, mlp, x = learnt(), MLP(16), torch.randn(2, 7, 16)
    nn.init.zeros_(part.scale)
    assert torch.equal(DynamicBranch(part).eval()(x, mlp), x + mlp(x))


def test_a_fresh_one_is_nearly_the_identity_and_exactly_where_asked():
    torch.manual_seed(0)
    x = torch.randn(2, 7, 768)
    part = AdapterPlus(768, bottleneck=8).eval()
    assert 0 < part(x).abs().max() < 0.1
    assert part.down.weight.abs().max() <= 0.02 and part.down.weight.std().item() == pytest.approx(0.0088, rel=0.05)
    assert torch.equal(AdapterPlus(768, zero_up=True).eval()(x), torch.zeros_like(x))
    assert sum(p.numel() for p in part.parameters()) == 2 * 768 * 8 + 8 + 2 * 768


def test_drop_path_leaves_out_whole_images_in_training():
    torch.manual_seed(0)
    part, x = learnt(drop_path=0.5), torch.randn(64, 3, 16)
    ratio = part.train()(x) / part.eval()(x)
    kept = ratio.flatten(1).mean(1).round()
    assert set(kept.tolist()) == {0.0, 2.0}
    torch.testing.assert_close(ratio, kept[:, None, None].expand_as(ratio))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(bottleneck=0), 'bottleneck must be a positive integer, got 0'),
        (dict(drop_path=1), r'drop_path must lie in \[0, 1\), got 1'),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdapterPlus(16, **options)
