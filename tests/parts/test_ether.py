import pytest
import torch

from mmdyt.parts.ether import ETHER
from mmdyt.parts.ether_plus import ETHERPlus

OUT, IN = 12, 8


def reflections(vectors, sign=-2.0):
    """The dense block-diagonal matrix of ``I + sign u u^T`` in each block, written out."""
    unit = vectors / vectors.norm(dim=-1, keepdim=True)
    return torch.block_diag(*(torch.eye(u.numel(), dtype=u.dtype) + sign * u.outer(u) for u in unit))


def turns(pair):
    """The dense block-diagonal matrix of ``I - u u^T + v v^T`` in each block."""
    width = pair.shape[1] * pair.shape[2]
    eye = torch.eye(width, dtype=pair.dtype)
    return eye + (reflections(pair[0], -1.0) - eye) + (reflections(pair[1], 1.0) - eye)


def make(kind, **options):
    torch.manual_seed(0)
    part = kind(OUT, IN, **options).double()
    for parameter in part.parameters():
        torch.nn.init.normal_(parameter)
    return part, torch.randn(OUT, IN).double(), torch.randn(OUT).double(), torch.randn(3, 5, IN).double()


@pytest.mark.parametrize('blocks', [1, 2, 4])
def test_ether_is_the_dense_product_with_block_diagonal_reflections(blocks):
    part, weight, bias, x = make(ETHER, blocks=blocks)
    dense = weight @ reflections(part.vectors[0])
    torch.testing.assert_close(part(x, weight, bias), x @ dense.T + bias, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(part.merged(weight, bias)[0], dense, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('blocks', [1, 2, 4])
def test_ether_stays_at_one_distance_from_the_identity(blocks):
    part, *_ = make(ETHER, blocks=blocks)
    distance = (part.merged(torch.eye(IN).double(), None)[0] - torch.eye(IN)).norm()
    assert distance.item() == pytest.approx(2 * blocks**0.5, rel=1e-6)  # arXiv 2405.20271, section 3.2


def test_two_reflections_start_as_the_identity_and_merge():
    fresh = ETHER(OUT, IN, reflections=2)
    x, weight = torch.randn(3, IN), torch.randn(OUT, IN)
    torch.testing.assert_close(fresh(x, weight, None), x @ weight.T, rtol=1e-5, atol=1e-5)
    part, weight, bias, x = make(ETHER, reflections=2)
    dense = weight @ reflections(part.vectors[1]) @ reflections(part.vectors[0])
    torch.testing.assert_close(part(x, weight, bias), x @ dense.T + bias, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(part.merged(weight, bias)[0], dense, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('blocks', [1, 2, 4])
def test_ether_plus_is_the_dense_product_on_both_sides(blocks):
    part, weight, bias, x = make(ETHERPlus, blocks=blocks)
    dense = turns(part.outputs) @ weight @ turns(part.inputs)
    torch.testing.assert_close(part(x, weight, bias), x @ dense.T + bias, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(part.merged(weight, bias)[0], dense, rtol=1e-6, atol=1e-6)


def test_ether_plus_starts_as_the_identity_with_gradients_for_all():
    part, x, weight = ETHERPlus(OUT, IN), torch.randn(3, 5, IN), torch.randn(OUT, IN)
    out = part(x, weight, None)
    torch.testing.assert_close(out, x @ weight.T, rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    assert all(side.abs().sum() > 0 for parameter in part.parameters() for side in parameter.grad)


def test_ether_plus_is_never_farther_than_root_two_from_the_identity():
    for seed in range(20):
        torch.manual_seed(seed)
        distance = (turns(torch.randn(2, 1, IN).double()) - torch.eye(IN)).norm().item()
        assert distance <= 2**0.5 + 1e-9


def test_parameters_and_costs():
    assert sum(p.numel() for p in ETHER(OUT, IN).parameters()) == IN
    assert ETHER(OUT, IN).macs_per_token() == 2 * IN
    assert sum(p.numel() for p in ETHERPlus(OUT, IN, blocks=2).parameters()) == 2 * (IN + OUT)
    assert ETHERPlus(OUT, IN).macs_per_token() == 4 * (IN + OUT)


@pytest.mark.parametrize(
    ('kind', 'options', 'message'),
    [
        (ETHER, dict(blocks=3), r'blocks must divide the widths \[8\], got 3'),
        (ETHERPlus, dict(blocks=8), r'blocks must divide the widths \[8, 12\], got 8'),
        (ETHER, dict(blocks=0), 'blocks must divide'),
        (ETHER, dict(reflections=3), 'reflections must be 1 or 2, got 3'),
    ],
)
def test_bad_arguments_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(OUT, IN, **options)
